"""Tasks: one file each, with its `run(config, workdir)`."""
