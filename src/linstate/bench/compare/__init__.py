"""All architectures side by side: cost, speed, capacity, and what tiny models of them learn."""
