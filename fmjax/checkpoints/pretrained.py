"""Models that are in a folder: a run's, one in Hugging Face format, or a repository of the hub.

`open_folder` opens one to be applied; `initial` and `resolved` start a run from it (`config.init`).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fmjax import adapters, build, convert, data
from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.config import rules
from fmjax.convert.options import default_names
from fmjax.data.settings import ROWS_OF_TASK
from fmjax.data.tokenizer import digests
from fmjax.data.vocabulary import MAX_VOCAB
from fmjax.distributed import agreement
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import AnyModel, param_init
from fmjax.params import paths

FRESH = rf"head/.*|{adapters.LEAVES}"  # parameters that a source may lack: they start fresh


class Opened(NamedTuple):
    """A model from a folder, ready to be applied."""

    source: str  # the folder or hub id that was asked for
    model: AnyModel
    params: Any  # stored tree on the mesh
    tokenizer: Path  # in transformers format
    missing: tuple[str, ...]  # parameters that the folder lacks: freshly initialised
    config: ConfigDict | None  # what the run was started with; None for Hugging Face format
    step: int | None  # of the run
    labels: tuple[str, ...] = ()  # names of the classes that it was trained for
    several: bool = False  # whether several of these may be true of an example, each by itself
    averaged: bool = False  # the run's moving average, which its validation measures too

    def __str__(self) -> str:
        step = "" if self.step is None else f" at step {self.step}"
        return self.source + step + (" (averaged parameters)" if self.averaged else "")

    @property
    def heads(self) -> list[str]:
        """The trained heads that have an objective for labelled data."""
        missing = {parameter.split("/")[1] for parameter in self.missing if "head/" in parameter}
        heads = dict(self.model.cfg.classes)
        return [name for name in heads if name in ROWS_OF_TASK and name not in missing]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the classes or tags that its head tells apart: those that it was trained
        for, else LABEL_0, LABEL_1, … as in transformers; () without such a head."""
        heads = dict(self.model.cfg.classes)
        outputs = next((heads[name] for name in ("classify", "tag") if name in heads), 0)
        return self.labels or default_names(outputs)

    def prepare(self, settings: Mapping[str, Any]) -> data.Dataset:
        """The data of `settings` (`config.data`) in tokens that the model has.

        Raises ConfigError where its tokenizer and its embeddings do not belong together, DataError
        where the processes have other data than each other.
        """
        words, rows = {"name": str(self.tokenizer)}, getattr(self.model.cfg, "vocab_size", None)
        dataset = data.prepare(settings, words, embedding_rows=rows)
        agreement.check_data(dataset)
        build.check_types(self.model, dataset.facts.get("types", 1))
        if (start := getattr(self.model.cfg, "start_id", None)) is None:
            return dataset
        return dataclasses.replace(dataset, vocab=dataset.vocab._replace(start_id=start))

    def require_head(self, name: str) -> None:
        """Raise ConfigError for a head that is not trained, whose numbers would be noise."""
        if any(parameter.startswith(f"head/{name}/") for parameter in self.missing):
            trained_by = {"mlm": "mlm", "lm": "seq2seq" if self.model.decodes else "clm"}
            raise ConfigError(
                f"config.folder={self.source!r} has no trained head {name!r}: its predictions "
                "would be random. Use a folder of a model trained for it, or train one with "
                f"--config=configs/{trained_by.get(name, 'finetune')}.py "
                f"--config.init={self.source}"
            )

    def require_output(self) -> None:
        """Raise ConfigError without a trained output, which gives the logits of tokens. One that is
        tied to the embedding has no parameters of its own."""
        self.require_head("lm" if self.model.causal or self.model.decodes else "mlm")


def described(source: str, heads: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """(name, arguments of its `Model`) of the model in a run folder, in a folder in Hugging Face
    format, or of a hub id; without its heads and its precision, but with what is before those of
    its `heads` that are named."""
    if is_run(source):
        name, options = _described(checkpointer.load_meta(source), source)
    else:
        name, options = convert.describe(convert.find(source))
    own = ("classes", "lm_head", "prefix", "dtype")  # what follows from a config's objectives
    if not options.get("classes", {}).keys() & set(heads):
        own += ("pooler", "pool")
    return name, {key: value for key, value in options.items() if key not in own}


def identity(model: AnyModel) -> dict[str, Any]:
    """The description of a model that a checkpoint stores, as JSON; `described` reads it."""
    module = type(adapters.base(model)).__module__
    package, _, name = module.rpartition(".")
    name = name if package == "fmjax.models" else f"{module}:Model"
    return {"name": name, "options": dataclasses.asdict(model.cfg)}


def _described(meta: Mapping[str, Any], folder: str | Path) -> tuple[str, dict[str, Any]]:
    """(name, options) that `identity` wrote; checked, since a folder may come from anybody."""
    try:
        name, options = meta["model"]["name"], dict(meta["model"]["options"])
        options["classes"] = {str(head): outputs for head, outputs in options.get("classes", ())}
        rules.check({"model": {"name": name, **options}})
        if not all(isinstance(n, int) and 0 < n <= MAX_VOCAB for n in options["classes"].values()):
            raise ValueError(f"classes are {options['classes']}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its checkpoint does not describe a model ({error})."
        ) from error
    return name, options


def check_unchanged(folder: Path, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a processor of a run (its tokenizer, …) is no longer the one
    that `meta`, of one of its checkpoints, has the digests of."""
    for processor, saved in meta.get("processors", {}).items():
        present = digests(folder / processor)
        names = saved.keys() | present.keys()
        if changed := sorted(name for name in names if saved.get(name) != present.get(name)):
            raise CheckpointError(
                f"{folder / processor / changed[0]} is not what it was when the run saved step "
                f"{meta['step']}: the model was trained with another {processor}. Put the file "
                f"back; or export the run, and change the {processor} of the export."
            )


def _tokenizer(source: str) -> Path:
    """The folder of the source's tokenizer, if it has one."""
    return Path(source, "tokenizer") if is_run(source) else convert.find(source)


def is_run(source: str | Path) -> bool:
    """True if `source` is the folder of a run, as opposed to one in Hugging Face format."""
    return any(os.path.exists(Path(source, name)) for name in ("checkpoints", "status.json"))


def open_folder(
    source: str,
    mesh: jax.sharding.Mesh,
    precision: str | None = None,
    step: int | None = None,
    texts: bool = True,
) -> Opened:
    """The model of `config.folder`, wherever it comes from.

    Args:
        source: a run folder, whose averaged parameters are taken where it keeps them, a folder in
            Hugging Face format, or a hub id (`id@revision`). It is read as data; nothing in it is
            executed.
        precision: of the computation; None takes the run's, float32 for Hugging Face format.
        step: of the run; None takes its newest undamaged checkpoint.
        texts: the caller has texts for the model, so that a run without a tokenizer is refused.

    Raises ConfigError for what is no such folder, CheckpointError for damage and for a step that is
    not there.
    """
    if not source:
        raise ConfigError(
            "config.folder is empty. Give a run folder, such as --config.folder=runs/mlm-1a2b3c4d, "
            "a folder in Hugging Face format, or a hub id."
        )
    if is_run(source):
        return _open_run(Path(source), mesh, precision, step, texts)
    if step is not None:
        raise ConfigError(
            f"config.step={step}, but config.folder={source!r} is not the folder of a run and has "
            "no steps: leave config.step out."
        )
    folder = convert.find(source)
    if not _has_tokenizer(folder):
        raise ConfigError(f"config.folder={source!r} has no tokenizer (tokenizer.json).")
    convert.check_class(folder)
    name, options = convert.describe(folder)
    built = build.factory_of(name)(**options, dtype=precision or "float32")
    built = built.clone(stacks=paths.kind_runs(built.kinds))
    fresh = functools.partial(param_init.init_params, built, jax.random.key(0))
    abstract = param_init.abstract_params(built, mesh)
    params, report = convert.load(folder, abstract, may_miss=FRESH, initial=fresh)
    return Opened(
        source,
        built,
        params,
        folder,
        report.kept,
        config=None,
        step=None,
        labels=convert.labels(folder),
        several=convert.several_labels(folder),
    )


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "vocab.txt", "vocab.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.model"))


def _open_run(
    folder: Path, mesh: jax.sharding.Mesh, precision: str | None, step: int | None, texts: bool
) -> Opened:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} cannot be read: there is no such file.")
    saved = configs.load(str(file))
    needed = {"model.name", "data.format", "precision"}
    if missing := needed - configs.flatten(saved).keys():
        raise CheckpointError(f"{file} is not that of a training run: it lacks {sorted(missing)}.")
    if texts and "tokenizer" not in saved:
        raise ConfigError(
            f"config.folder={str(folder)!r} is a model of {saved.data.format}, not of texts, and "
            "has no tokenizer: configs/evaluate.py measures it, and this task cannot read it."
        )
    if precision:
        with saved.unlocked():
            saved.precision = precision
    params, meta, averaged = checkpointer.load_params(folder, step)
    check_unchanged(folder, meta)
    name, options = _described(meta, folder)
    how = {
        key: saved.model[key]
        for key in ("attention", "scan")
        if key in options.keys() & saved.model.keys()
    }
    built = build.factory_of(name)(**options | how | {"dtype": saved.precision})
    built = adapters.wrap(built, saved.to_dict())
    build.check_rows(built, saved.data.to_dict())
    built = built.clone(stacks=paths.kind_runs(built.kinds))
    abstract = param_init.abstract_params(built, mesh)
    params, _ = _laid_out(params, built, abstract, str(folder))
    return Opened(
        str(folder),
        built,
        params,
        tokenizer=folder / "tokenizer",
        missing=(),
        config=saved,
        step=meta["step"],
        labels=_labels(meta),
        several=saved.data.format == "labels",
        averaged=averaged,
    )


def _labels(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a run was trained for."""
    return tuple(configs.flatten(meta).get("fingerprint.labels") or ())


def _begun_poolers(have: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, str]:
    """{parameter: the one that it starts from} of the layer before linear heads that `have` lacks,
    where a vocabulary head has the same layer, as ModernBERT's: from_pretrained of transformers
    starts a task with that, too."""
    lacking = [name for name in wanted if name not in have]
    layer = re.compile(r"head/pooler/((dense|norm)/\w+)")
    twins = {name: f"head/mlm/{match[1]}" for name in lacking if (match := layer.fullmatch(name))}
    return {name: twin for name, twin in twins.items() if twin in have}


def _laid_out(
    found: paths.Tree,
    model: AnyModel,
    abstract: paths.Tree,
    source: str,
    fresh: Callable[[], paths.Tree] | None = None,
    leave: str = "",
    packings: Mapping[str, adapters.Packing] | None = None,
) -> tuple[paths.Tree, convert.Report]:
    """`found`, on the host and in any stacks, in those of `abstract` and where its shardings say,
    quantized where the `model` has it so.

    Heads and adapters that `found` lacks, and names that match `leave`, are taken from `fresh()`, a
    whole tree; only they are computed.
    """
    have, wanted = paths.unstack(found), paths.unstack(abstract)
    have = {name: leaf for name, leaf in have.items() if not re.fullmatch(leave, name)}
    begun = _begun_poolers(have, wanted) if fresh else {}
    have |= {name: have[twin] for name, twin in begun.items()}
    for name, (shape, pack) in (packings or {}).items():
        if name in have and have[name].shape == shape:
            whole = have.pop(name)
            have |= {f"{name}/{part}": np.asarray(x) for part, x in pack(whole).items()}
    kept_as = [name for name in have if name.endswith("/codes")]
    if any(name not in wanted or have[name].dtype != wanted[name].dtype for name in kept_as):
        raise ConfigError(
            f"{source} has a quantised base: set config.quantise as in its config.json, or start "
            "from what configs/export.py makes of it, which is whole."
        )
    shown = lambda x: "nothing" if x is None else f"{x.dtype}{list(x.shape)}"
    kept = [n for n in wanted.keys() - have.keys() if fresh and re.fullmatch(FRESH, n)]
    problems = [
        f"  {name}: {shown(leaf)} in the model, {shown(have.get(name))} in the checkpoint"
        for name, leaf in wanted.items()
        if name not in kept and shown(leaf) != shown(have.get(name))
    ]
    if problems:
        more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckpointError(
            f"{source} does not fit the model:\n" + "\n".join(problems[:20] + more) + "\n"
            "Set config.model and config.tokenizer as in its config.json."
        )
    places = {path: leaf.sharding for path, leaf in paths.flatten(abstract).items()}
    stored = paths.stack({name: have[name] for name in wanted if name in have}, model.stacks)
    params = {
        path: jax.device_put(np.asarray(leaf), places[path])
        for path, leaf in paths.flatten(stored).items()
    }
    if kept:
        lacking = places.keys() - params.keys()
        some = lambda: {path: paths.flatten(fresh())[path] for path in lacking}
        params |= jax.jit(some, out_shardings={path: places[path] for path in lacking})()
    unused = sorted(have.keys() - wanted.keys() - set(begun.values()))
    if lost := [name for name in unused if re.fullmatch(adapters.LEAVES, name)]:
        raise ConfigError(
            f"{source} has an adapter ({lost[0]}, …) that the model has no place for: set "
            "config.adapter as in its config.json, or start from what configs/export.py makes of "
            "it, which has the adapter merged."
        )
    return paths.unflatten(params), convert.Report(tuple(sorted(kept)), tuple(unused))
