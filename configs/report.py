"""Writes report.html again: of a run, also while it goes on, or of a sweep that has ended once.

    python run.py --config=configs/report.py --config.folder=runs/mlm-1a2b3c4d
    python run.py --config=configs/report.py --config.folder=runs/depth

The page is one file that needs nothing else; a sweep's figures are also pictures in figures/.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task = "report"
    config.folder = ""
    return config
