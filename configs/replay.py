"""One step of a run again, to see why its loss or its gradient was what it was.

    python run.py --config=configs/replay.py --config.folder=runs/mlm-1a2b3c4d --config.step=1234

Starts from the nearest checkpoint before the step, so that the fewer are kept the longer it takes
(`--config.keep` of the run). Prints the examples with the highest losses and the norms of layers;
all of both is in dumps/replay_1234.json of the run folder. Of runs that were computed together
give the folder of one, arms/0.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "replay"
    config.folder = ""
    config.step = 1  # as logs and events count: the first update is 1
    config.top_k = 5  # examples to print
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
