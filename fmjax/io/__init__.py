"""Files: run folders, logs, progress, the disk cache, the hub."""
