"""Several processes and devices: start, signals, agreement, watchdogs."""
