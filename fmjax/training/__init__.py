"""Training: the loop, its step, its state, and what a config means."""
