"""Measured tables: what a model can and cannot do, in numbers that anyone can repeat."""
