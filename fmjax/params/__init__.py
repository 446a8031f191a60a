"""Parameter trees: names, groups, randomness by address, the one matrix product, shardings."""
