"""Side effects of training: `config.ledger`, measured after training, in ledger.json.

    config.ledger = ("forgetting", "memory", "samples", "slices")

    forgetting  the loss that `config.init` was trained with, `before` this training and `after` it:
                what is higher has been forgotten
    memory      `peak_bytes` of the step of this run alone by the compiler, a device: state, batch
                and temporary arrays
    samples     what the model writes, as `config.samples` says: keys of configs/generate.py
    slices      of the last evaluation by class and by length: the metrics of single examples

`config.pretraining` holds what forgetting is measured on, with the keys of configs/evaluate.py;
what it leaves out is as the base itself was trained. Arms have a file each.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fmjax import build
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import tokenizer
from fmjax.errors import ConfigError
from fmjax.evaluation import measurement
from fmjax.generation import text_generator
from fmjax.io import atomic, metrics_log, storage, workdir
from fmjax.params import paths
from fmjax.reports import run_report
from fmjax.training import initialize, plan, vmapped_runs
from fmjax.training.setup import Run

PRETRAINING = dict(
    data={}, objectives=None, split="validation", batch_size=None, precision=None, limit=0
)
LENGTHS = 4  # parts of as many examples


class Ledger:
    """Measurements of the arms of a run. Raises ConfigError if one is impossible, before any is
    trained."""

    def __init__(self, config: Any, vmapped: vmapped_runs.VmappedRuns, mesh: jax.sharding.Mesh):
        self.asked = tuple(config.get("ledger", ()))
        self.vmapped, self.mesh = vmapped, mesh
        self._peaks: dict[Any, int] = {}
        if "forgetting" in self.asked:
            self.pretraining = json.dumps(configs.plain(config.pretraining), sort_keys=True)
            base(config.init, self.pretraining, mesh).check(vmapped.padded_run)
        if "samples" in self.asked:
            _check_samples(vmapped.padded_run)

    def write(self, folders: Sequence[workdir.Folder]) -> None:
        """Measures the finished runs in their folders; what is known already is left as it is."""
        for folder, run in zip(folders, self.vmapped.runs, strict=True):
            if not self.asked or folder.failure:
                continue
            file, of = folder.path / workdir.LEDGER, dict(step=run.total, asked=self.asked)
            if "forgetting" in self.asked:
                of["pretraining"] = self.pretraining
            if "samples" in self.asked:
                of["samples_of"] = run.config.samples.to_dict()
            of = json.loads(json.dumps(of))
            before = storage.read_object(file)
            if of.items() <= before.items():
                continue
            found = {name: getattr(self, f"_{name}")(folder.path, run) for name in self.asked}
            if jax.process_index() == 0:
                atomic.write_atomic(file, json.dumps(metrics_log.plain(of | found), indent=2))
                run_report.write(folder.path)

    def _forgetting(self, folder: Path, run: Run) -> dict[str, float]:
        measured = base(run.config.init, self.pretraining, self.mesh)
        return {"before": measured.before, "after": measured(str(folder), self.mesh)}

    def _memory(self, folder: Path, run: Run) -> dict[str, int]:
        if run.model not in self._peaks:  # Seeds have one program.
            self._peaks[run.model] = plan.peak_bytes(
                plan.compiled(vmapped_runs.VmappedRuns((run,)))
            )
        return {"peak_bytes": self._peaks[run.model]}

    def _samples(self, folder: Path, run: Run) -> list[str]:
        opened = pretrained.open_folder(str(folder), self.mesh)
        texts = text_generator.texts(opened, run.config.samples.to_dict(), run.config.seed)
        if jax.process_index() == 0:
            print(f"\n{text_generator.shown(run.config.samples.prompt, texts)}\n")
        return texts

    def _slices(self, folder: Path, run: Run) -> dict[str, Any]:
        examples = workdir.read_examples(folder)
        return slices(examples, run.dataset.labels) if examples else {}


def _check_samples(run: Run) -> None:
    """Raise ConfigError for samples that a run's model cannot write."""
    how = dict(run.config.get("samples") or {})
    wanted = ("prompt", "count", "length", "temperature", "top_k")
    if sorted(how) != sorted(wanted):
        raise ConfigError(
            f"config.ledger has 'samples', which needs config.samples to have {', '.join(wanted)}; "
            f"it has {', '.join(how) or 'none of them'}. configs/clm.py has an example."
        )
    words = tokenizer.load(run.dataset.tokenizer_dir)
    text_generator.prompt_ids(run.model, words, how, run.config.data.seq_len, of="config.samples")


def slices(examples: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, list[dict]]:
    """{"classes": […], "lengths": […]}, of each part which examples are in it (`name`), how many
    (`examples`), and the mean of each metric; parts of the lengths, in tokens, are equally large
    but for equal lengths, which stay together."""
    metrics = {key: x for key, x in examples.items() if key not in workdir.ABOUT_EXAMPLES}

    def part(name: str, chosen: np.ndarray) -> dict[str, Any]:
        means = {key: float(x[chosen].mean(dtype=np.float64)) for key, x in metrics.items()}
        return {"name": name, "examples": int(chosen.sum()), **means}

    found = {}
    labels = examples.get("label")
    if (
        labels is not None
        and names
        and labels.ndim == 1
        and np.issubdtype(labels.dtype, np.integer)
    ):
        found["classes"] = [
            part(name, labels == i) for i, name in enumerate(names) if (labels == i).any()
        ]
    if "tokens" in examples:
        tokens = examples["tokens"]
        bounds = np.quantile(tokens, np.arange(1, LENGTHS) / LENGTHS, method="higher")
        number = np.searchsorted(np.unique(bounds), tokens, side="right")
        parts = [number == i for i in np.unique(number)]
        found["lengths"] = [
            part(f"{tokens[chosen].min()} … {tokens[chosen].max()} tokens", chosen)
            for chosen in parts
        ]
    return found


class PretrainingLoss:
    """The loss that the model of `source` was trained with, of a model that was made of it.

    Heads that the model lacks are those of `source`. Texts stand alone in their rows, as a prompt
    has to be before each.
    """

    def __init__(self, settings: Mapping[str, Any], source: str, mesh: jax.sharding.Mesh):
        if wrong := settings.keys() - PRETRAINING.keys():
            raise ConfigError(
                f"config.pretraining.{min(wrong)} is not known. Possible: {', '.join(PRETRAINING)}."
            )
        config = ConfigDict(PRETRAINING | dict(settings))
        self.base = pretrained.open_folder(source, mesh, config.precision)
        self.precision = self.base.model.cfg.dtype
        try:
            self.measure = measurement.Measure(config, self.base, mesh, alone=True)
        except ConfigError as error:
            raise ConfigError(f"for config.pretraining: {error}") from error
        self.before = self(source, mesh)

    def check(self, run: Run) -> None:
        """Raise ConfigError for a run whose model has no room for these texts."""
        initialize.check_head(run.config, run.dataset.labels)
        try:
            build.check_rows(run.model, self.measure.settings)
        except ConfigError as error:
            raise ConfigError(f"for config.pretraining: {error}") from error

    def __call__(self, folder: str, mesh: jax.sharding.Mesh) -> float:
        opened = pretrained.open_folder(folder, mesh, self.precision)
        return self.measure(*with_heads(opened, self.base), mesh)["loss"]


@functools.lru_cache(maxsize=1)
def base(source: str, settings: str, mesh: jax.sharding.Mesh) -> PretrainingLoss:
    """The pretraining loss of `source`, which the trials of a sweep share."""
    return PretrainingLoss(json.loads(settings), source, mesh)


def with_heads(opened: pretrained.Opened, base: pretrained.Opened) -> tuple[Any, Any]:
    """The model and parameters of `opened` with the heads of `base` that it has not."""
    own, heads = paths.flatten(opened.params), paths.flatten(base.params)
    lacking = {p: x for p, x in heads.items() if p.startswith("head/") and p not in own}
    classes = dict(base.model.cfg.classes) | dict(opened.model.cfg.classes)
    cfg = dataclasses.replace(
        opened.model.cfg, lm_head=base.model.cfg.lm_head, classes=tuple(classes.items())
    )
    return opened.model.clone(cfg=cfg), paths.unflatten(own | lacking)
