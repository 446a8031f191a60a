"""Questions that a run is asked each time it is evaluated: `config.benchmarks`.

    config.benchmarks = ({"name": "blimp", "path": "blimp/", "limit": 20}, {"name": "lambada", …})

Each has the keys of `config.benchmark` in configs/fewshot.py, asked behind no examples. What is
found stands among the validation metrics, as validation/blimp/accuracy.
"""

from typing import Any

import jax

from fmjax import fewshot, pretrained, questions
from fmjax.choices import encoder
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError
from fmjax.setup import Run


class Exams:
    """What a run is asked. Raises ConfigError and DataError for files that hold something else."""

    def __init__(self, run: Run):
        self.run, self.items = run, {}
        for given in run.config.get("benchmarks", ()):
            wanted = {"limit": 0, **given}
            (self.items[wanted["name"]], _), *_ = questions.asked(wanted, (), (), False).values()
        if self.items and jax.process_count() > 1:
            raise ConfigError("config.benchmarks are asked in one process: leave them empty.")
        self.names = [f"{name}/accuracy" for name in self.items]

    def __call__(self, params: Any) -> dict[str, float]:
        """{"blimp/accuracy": the mean over its items}, of the run's model with the parameters."""
        run, metrics = self.run, {}
        folder = run.dataset.tokenizer_dir
        opened = pretrained.Opened("", run.model, params, folder, (), run.config, None)
        words = tokenizers.load(folder)
        scorer = fewshot.scorer_of(opened, words, run.config.batch_size, "token")
        for name, items in self.items.items():
            _, found = fewshot.judged(scorer, encoder(words, run.model.decodes), items)
            metrics[f"{name}/accuracy"] = found["accuracy"]["mean"]
        return metrics
