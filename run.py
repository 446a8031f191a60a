"""Run a task of fmjax on a config: see fmjax/__main__.py, or `python run.py --help`."""

from fmjax.__main__ import command

if __name__ == "__main__":
    command()
