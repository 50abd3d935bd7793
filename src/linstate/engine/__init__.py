"""Read, generate and ask with a model and its state."""
