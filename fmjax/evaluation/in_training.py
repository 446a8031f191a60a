"""Questions that a run is asked each time it is evaluated: `config.benchmarks`.

    --config.benchmarks="({'name': 'blimp', 'path': 'blimp/', 'limit': 20}, {'name': 'lambada', …})"

Each has the keys of `config.benchmark` in configs/fewshot.py, asked after no examples. What is
found is among the validation metrics, as validation/blimp/accuracy.
"""

from collections.abc import Callable
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.data import Dataset
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError
from fmjax.evaluation import benchmarks, scoring
from fmjax.evaluation.loglikelihood import Scorer
from fmjax.evaluation.multiple_choice import encoder
from fmjax.models import AnyModel


class TrainingBenchmarks:
    """Benchmarks evaluated during training. Raises ConfigError and DataError for files with other
    contents."""

    def __init__(self, config: Any, model: AnyModel, dataset: Dataset):
        self.config, self.model, self.dataset, self.items = config, model, dataset, {}
        for given in config.get("benchmarks", ()):
            wanted = {"limit": 0, **given}
            (self.items[wanted["name"]], _), *_ = benchmarks.asked(wanted, (), (), False).values()
        if self.items and jax.process_count() > 1:
            raise ConfigError("config.benchmarks are asked in one process: leave them empty.")
        if self.items and config.cache_prefix:
            raise ConfigError(
                "config.benchmarks are asked of the whole model, of which config.cache_prefix "
                "leaves the frozen part out: leave one of them."
            )
        if self.items:
            self.scorer(None)  # says now what cannot be asked of such a model
        self.names = [f"{name}/accuracy" for name in self.items]

    def scorer(self, params: Any) -> Scorer:
        """Judges texts by the run's model with the parameters."""
        config, folder = self.config, self.dataset.tokenizer_dir
        opened = pretrained.Opened("", self.model, params, folder, (), config, None)
        # As much memory as a microbatch takes.
        rows = config.batch_size // config.accumulate
        return scoring.scorer_of(opened, tokenizers.load(folder), rows, "token")

    def __call__(self, params: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """{"blimp/accuracy": the mean over its items}; None where `stop` came between."""
        words, scorer, metrics = tokenizers.load(self.dataset.tokenizer_dir), None, {}
        for name, items in self.items.items():
            if stop():
                return None
            scorer = scorer or self.scorer(params)
            _, found = scoring.judged(scorer, encoder(words, self.model.decodes), items)
            metrics[f"{name}/accuracy"] = found["accuracy"]["mean"]
        return metrics
