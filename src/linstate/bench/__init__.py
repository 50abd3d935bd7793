"""Measurements on this machine, peers in the same run."""
