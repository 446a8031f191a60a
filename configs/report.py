"""Writes report.html of a run folder again, for example while the run goes on.

    python run.py --config=configs/report.py --config.folder=runs/mlm-1a2b3c4d

The page is one file that needs nothing else.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task = "report"
    config.folder = ""
    return config
