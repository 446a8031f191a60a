"""Checkpoints: saving, verification, restoring, and opening a folder for use."""
