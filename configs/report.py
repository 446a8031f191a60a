"""Writes report.html of a run folder, or of a sweep's, again, for example while it goes on.

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
