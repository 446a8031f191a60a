"""Configs: loading, command-line overrides, the rules of each key and of keys together."""
