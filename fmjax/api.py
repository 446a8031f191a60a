"""fmjax for notebooks and scripts.

    import fmjax

    model = fmjax.load("runs/finetune-1a2b3c4d")  # a run, a Hugging Face folder, or a hub id
    model.classify(["a first text", "a second"])

    run = fmjax.train(fmjax.configs.load("configs/mlm.py:tiny", total="100 steps"))
    run.metrics["validation/loss"].values

What the methods give is what the tasks of the command line give for the same texts.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fmjax import configs
from fmjax.checkpoints import pretrained
from fmjax.config.load import digest
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError, Preempted
from fmjax.evaluation import fill_in, token_logits
from fmjax.evaluation.predictions import Predictor
from fmjax.evaluation.text_vectors import Embedder
from fmjax.generation.text_generator import TextGenerator
from fmjax.io import metrics_log, results, storage
from fmjax.params import sharding

__all__ = ["Curve", "Model", "Run", "load", "train"]


class Curve(NamedTuple):
    """A metric over a run: `steps` int [N] and `values` float [N]."""

    steps: np.ndarray
    values: np.ndarray


class Model:
    """A model with its parameters and tokenizer, opened by `load`.

    `params` is the stored tree, `model` the Linen module (or its wrapper by adapters), `config` the
    config of the run, None for a folder in Hugging Face format, `labels` the names of the classes.
    """

    def __init__(self, opened: pretrained.Opened, mesh: jax.sharding.Mesh):
        self._opened, self._mesh = opened, mesh
        self.model, self.params, self.config = opened.model, opened.params, opened.config
        self.labels, self.source, self.step = opened.output_names, opened.source, opened.step
        self.tokenizer = tokenizers.load(opened.tokenizer)
        self.objectives = tuple(opened.config.objectives) if opened.config else ()
        self._generator: TextGenerator | None = None

    def __repr__(self) -> str:
        return f"fmjax.load({str(self._opened)!r})"

    def encode(
        self, texts: Sequence[str], *, pool: str = "", normalize: bool = True, batch_size: int = 64
    ) -> np.ndarray:
        """Vectors float32 [N, D] of the texts, as configs/embed.py makes them: pooled by `pool`
        (first, last, mean; "": as the folder says, else mean), of length one if `normalize`."""
        changes = {"pool": pool, "normalize": normalize, "batch_size": batch_size}
        with self._asked("embed", [{"text": text} for text in texts], changes) as config:
            embedder = Embedder(config, self._opened, self._mesh)
            out = np.zeros(embedder.shape, np.float32)
            for index, rows in embedder():
                out[index] = rows
        return out

    def logits(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text, the logits float32 [T, V] of its tokens, those around it included: of a
        decoder for the next token, of an encoder for the token itself."""
        with jax.set_mesh(self._mesh):
            return token_logits.of_texts(self._opened, self.tokenizer, texts)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        length: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """A continuation of each prompt of at most `length` tokens, up to one of the texts `stop`;
        of an encoder–decoder, the text for each source. `temperature` 0 is greedy."""
        how = dict(length=length, temperature=temperature, top_k=top_k, top_p=top_p, count=1)
        how |= dict(stop=tuple(stop))
        with jax.set_mesh(self._mesh):
            self._generator = self._generator or TextGenerator(self._opened)
            each = [self._generator.texts(how | {"prompt": prompt}, seed) for prompt in prompts]
        return [texts[0] for texts in each]

    def classify(self, texts: Sequence[str | Sequence[str]]) -> list[dict[str, float]]:
        """For each text, or each pair of texts, the probability of each class by its name."""
        if self._tags:
            raise ConfigError(f"{self.source!r} labels words, not texts: call tag.")
        found = [one.get("probabilities") for one in self.predict(texts)]
        if any(not isinstance(one, Mapping) for one in found):
            raise ConfigError(f"{self.source!r} has no head that tells classes apart.")
        return [dict(one) for one in found if one is not None]

    def tag(self, texts: Sequence[str | Sequence[str]]) -> list[list[str | None]]:
        """For each text, given as its words or with white space between them, the label of each
        word: that of its first token. None for a word that the model does not see, as one beyond
        its longest text."""
        if not self._tags:
            raise ConfigError(f"{self.source!r} has no head that labels words.")
        return [one["tags"] for one in self.predict(texts)]

    def predict(self, texts: Sequence[str | Sequence[str]]) -> list[dict[str, Any]]:
        """For each text, or each tuple of texts, the output of the model's objective, as
        configs/predict.py writes it: a label and probabilities, a value, …; for each text, or each
        list of words, the tags of its words."""
        if self._tags:
            rows = [[text.split() if isinstance(text, str) else list(text)] for text in texts]
        else:
            rows = [[text] if isinstance(text, str) else list(text) for text in texts]
        columns = self._columns(max(map(len, rows), default=1))
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        changes = {"data.columns": ",".join(columns), "data.long": "truncate"}
        if self.config is None:
            changes |= {"data.seq_len": min(self.model.cfg.max_len, 512)}
        with self._asked("predict", records, changes) as config:
            return [output for _, output in Predictor(config, self._opened, self._mesh)()]

    def fill_mask(
        self, texts: Sequence[str], *, top_k: int = 5
    ) -> list[list[list[tuple[str, float]]]]:
        """For each mask token of each text, the `top_k` most probable (token, probability)."""
        with jax.set_mesh(self._mesh):
            rows = fill_in.encode(list(texts), self.tokenizer, fill_in.room(self.model))
            found = fill_in.guesses(self._opened, self.tokenizer, rows, top_k)
        pairs = lambda guesses: [(guess.token, guess.probability) for guess in guesses]
        return [[pairs(guesses) for guesses in masks] for masks in found]

    @property
    def _tags(self) -> bool:
        """True if the model labels words."""
        return "tag" in self._opened.heads

    def _columns(self, count: int) -> list[str]:
        own = self.config.data.columns if self.config else ""
        names = [name.strip() for name in own.split(",") if name.strip()]
        return names if len(names) == count else [f"text{i}" for i in range(1, count + 1)]

    @contextmanager
    def _asked(
        self, task: str, records: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]
    ) -> Iterator[ConfigDict]:
        """The config of a task on these records, which are in a file while the block runs."""
        if not records:
            raise ConfigError("there is no text.")
        with results.temporary_folder() as folder, jax.set_mesh(self._mesh):
            file = folder / "records.jsonl"
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            with storage.writing(file, storage.TMPDIR):
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            own = {"folder": self.source, "data.train": str(file), "data.cache": str(folder)}
            if "data.columns" not in changes:
                own["data.columns"] = "text"
            yield configs.load(f"configs/{task}.py", own | dict(changes))


class Run:
    """A training run in its folder. `state` is done, preempted or failed; `metrics` {name: Curve}
    has every number of its log."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        status = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        self.state, self.step = status["state"], status["step"]
        rows, _ = metrics_log.read(self.folder)
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for name in row.keys() - metrics_log.RESERVED:
                curves.setdefault(name, []).append((row["step"], row[name]))
        self.metrics = {
            name: Curve(np.array([s for s, _ in points]), np.array([v for _, v in points], float))
            for name, points in sorted(curves.items())
        }

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {self.state} at step {self.step}>"

    def load(self) -> Model:
        """The model of the newest checkpoint."""
        return load(self.folder)

    @property
    def params(self) -> Any:
        """The parameters of the newest checkpoint, a stored tree."""
        return self.load().params


def load(
    source: str | os.PathLike,
    *,
    precision: str | None = None,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Open a model for use: a run folder (its newest checkpoint, or that of `step`), a folder in
    Hugging Face format, or a hub id (id@commit).

    Args:
      precision: dtype of the computation; None: as the run was trained, else float32.
      mesh: None: all devices, data-parallel.

    Raises:
      ConfigError, CheckpointError: for a source that cannot be opened, by name and reason.
    """
    mesh = mesh or sharding.make_mesh()
    with jax.set_mesh(mesh):
        return Model(pretrained.open_folder(os.fspath(source), mesh, precision, step), mesh)


def train(config: ConfigDict, folder: str | os.PathLike | None = None) -> Run:
    """Train as `python -m fmjax --config=…` does, in `folder` (default: runs/train-<digest>), where
    the same call resumes. After Ctrl-C, the run as far as it was saved."""
    from fmjax.tasks import train as task  # brings much along

    folder = Path(folder or f"runs/train-{digest(config)}")
    try:
        task.run(config, folder)
    except Preempted:
        pass  # its state is saved, and the status says so
    return Run(folder)
