"""Text that a model writes, behind a prompt or from nothing.

    python run.py --config=configs/generate.py --config.folder=runs/clm-1a2b3c4d \\
        --config.prompt="Return the"

The folder is a run's, one in Hugging Face format, or a hub id (id@commit), of a decoder, or of an
encoder–decoder, for which the prompt is the source. `temperature=0` takes the most probable token
each time; what else is set cuts what is drawn from, in the order it has here
(fmjax/generation/sampling.py). One text is shown while it is written. In eight bits (`weights`,
`cache`) it is written faster, and is nearly the same; with a `draft` the likeliest text is the
same.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "generate"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.prompt = ""
    config.count = 3  # texts, each drawn by itself; one where nothing is drawn (temperature=0)
    config.length = 100  # tokens at most, beside the prompt
    config.temperature = 0.8
    config.top_k = placeholder(int)  # the most probable to draw from; None: all
    config.top_p = 1.0  # the fewest most probable that are so probable together
    config.min_p = 0.0  # those at least this share as probable as the most probable
    config.repetition_penalty = 1.0  # above 1: tokens that the text has get less probable
    config.beams = 1  # above 1: the likeliest text, found among so many; with temperature=0
    config.length_penalty = 1.0  # of beams: above 0 for longer texts
    config.stop = ()  # texts that end what is written, and are not part of it
    config.long = (
        "error"  # prompts without room for length; or cut, to their end, of a source the beginning
    )
    config.draft = ""  # a folder of a smaller model with the same tokens, which guesses
    config.ahead = 4  # so many of them (fmjax/generation/speculative.py)
    config.seed = 0
    config.precision = placeholder(str)  # None: as the run was trained, else float32
    config.weights = ""  # or int8: matrices, and the products with them, in eight bits
    config.cache = ""  # or int8: keys and values of what was seen in eight bits
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
