"""Initialization of a run from config.init: the model and its parameters."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fmjax import adapters, convert
from fmjax.adapters import quantise
from fmjax.checkpoints import checkpointer
from fmjax.checkpoints.pretrained import (
    FRESH,
    _described,
    _has_tokenizer,
    _labels,
    _laid_out,
    _tokenizer,
    check_unchanged,
    described,
    is_run,
)
from fmjax.config import load as configs
from fmjax.data import Dataset
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import AnyModel, composite, param_init
from fmjax.objectives import requirements
from fmjax.params import groups, paths


def resolved(config: Any) -> Any:
    """The config with the model and the tokenizer of `config.init` in the place of the name "init".

    What `config.model` says beside its name goes before what `config.init` has. Raises ConfigError
    where there is nothing to take.
    """
    sections = [key for key in ("model", "tokenizer") if key in config]
    wanted = [key for key in sections if config[key].name == "init"]
    if not wanted:
        return _with_start(config)
    if not config.init:
        raise ConfigError(
            f"config.{wanted[0]}.name='init' means the {wanted[0]} of config.init, which is empty: "
            "set --config.init to a run folder, a folder in Hugging Face format, or a hub id."
        )
    if config.init.startswith("runs/") and not os.path.isdir(config.init):
        name = config.init.removeprefix("runs/").rpartition("-")[0] or "mlm"
        raise ConfigError(
            f"config.init={config.init!r} does not exist. python run.py --config=configs/{name}.py "
            "makes the default one; or set --config.init to another run folder, a folder in "
            "Hugging Face format, or a hub id."
        )
    if not (config.new_head or is_run(config.init)):
        convert.check_class(convert.find(config.init))
    config = ConfigDict(config.to_dict())
    if "tokenizer" in wanted:
        if is_run(config.init):
            check_unchanged(Path(config.init), checkpointer.load_meta(config.init))
        config.tokenizer.name = str(_tokenizer(config.init))
    if "model" in wanted:
        goes_on = () if config.new_head else tuple(config.objectives)
        name, options = described(config.init, goes_on)
        own = {key: value for key, value in config.model.items() if value is not None}
        config.model = options | own | {"name": name}
    return _with_start(config.lock())


def _with_start(config: Any) -> Any:
    """The config with the token that the encoder–decoder of `config.init` begins a target with,
    where `config.model` gives the sizes itself."""
    if not config.init or config.model.get("name") != "t5" or "start_id" in config.model:
        return config
    start = described(config.init)[1].get("start_id")
    if start is None:
        return config
    config = ConfigDict(config.to_dict())
    config.model.start_id = start
    return config.lock()


class Start(NamedTuple):
    """The initial parameters of a run."""

    params: Any  # stored tree
    fresh: tuple[str, ...] = ()  # names of the parameters that the source lacks


def initial(
    config: Any,
    model: AnyModel,
    abstract: Any,
    beside: Any = None,
    key: jax.Array | None = None,
) -> Start | None:
    """Parameters to start from: None (fresh), unless `config.init` names a source.

    That is a run folder, a folder in Hugging Face format or a hub id (`id@revision`). Heads and
    adapters that it does not have start fresh, and are named; with `config.new_head` the heads of
    the objectives do so in any case. Raises CheckpointError where shapes differ.

    `beside` are the parameters of another run with the same source, of which the run takes all that
    `abstract` does not name, and nothing is told. `key` draws what is fresh; None: the seed's.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), 0) if key is None else key
    if not config.init:
        return None
    if isinstance(config.init, Mapping | ConfigDict):
        return _initial_parts(config, model, abstract, key)
    heads = "|".join(f"head/{name}/.*" for name in config.objectives) if config.new_head else ""
    wanted = paths.unstack(abstract)
    if heads and not any(re.fullmatch(heads, name) for name in wanted):
        raise ConfigError(
            f"config.new_head=True, but the objectives {list(config.objectives)} have no head."
        )
    fresh = functools.partial(param_init.init_params, model, key)
    audit: dict[str, float] = {}
    packings = adapters.packings(model, audit) if beside is None else {}
    if is_run(config.init):
        params, saved, averaged = checkpointer.load_params(config.init)
        found = paths.unstack(params)
        if beside is not None:
            params = paths.unflatten({name: found[name] for name in found.keys() & wanted.keys()})
        whole = functools.partial(quantise.matrix, found)
        params, report = _laid_out(params, model, abstract, config.init, fresh, heads, packings)
        source = f"step {saved['step']} of {config.init}"
        source += " (averaged parameters)" if averaged else ""
    else:
        whole = functools.partial(_matrix, convert.find(config.init), packings)
        params, report = convert.load(
            convert.find(config.init),
            abstract,
            may_miss=FRESH,
            leave=heads,
            packings=packings,
            initial=fresh,
        )
        source = config.init
    tokenize = lambda text: load_tokenizer(_tokenizer(config.init)).encode(
        text, add_special_tokens=False
    )
    start = functools.partial(adapters.start, model, tokenize=tokenize, whole=whole)
    if beside is not None:
        params = groups.merge(beside, params)
        if adapters.changes_base(model):  # which it has done, and made the adapter of the change
            made = adapters.of_adapter(beside)
            return Start(groups.merge(params, made), report.kept)
    elif jax.process_index() == 0:
        print(f"starting from {source}: {report}")
        if audit:
            print(_told(audit, config.quantise.name))
    return Start(start(params, report.kept, seed=config.seed), report.kept)


def _initial_parts(config: Any, model: Any, abstract: Any, key: jax.Array) -> Start:
    """Parameters of several models, each from its own folder in `config.init`, or fresh."""
    sources = dict(config.init)
    parts = getattr(model, "parts", {})
    if unknown := sorted(sources.keys() - parts.keys()):
        raise ConfigError(
            f"config.init names the model {unknown[0]!r}, which config.model.parts lacks."
            + did_you_mean(unknown[0], parts)
        )
    params, fresh = {}, []
    for name, part in parts.items():
        own_key = composite.part_key(key, name)
        if not sources.get(name):
            places = jax.tree.map(lambda x: x.sharding, abstract[name])
            draw = functools.partial(param_init.init_params, part)
            params[name] = jax.jit(draw, out_shardings=places)(own_key)
            continue
        own = ConfigDict(config.to_dict() | {"init": sources[name], "objectives": {}})
        start = initial(own.lock(), part, abstract[name], key=own_key)
        params[name] = start.params
        fresh += [f"{name}/{parameter}" for parameter in start.fresh]
    return Start(params, tuple(fresh))


def _matrix(folder: Path, packings: Mapping[str, adapters.Packing], name: str) -> jax.Array:
    """The parameter `name` of a folder in Hugging Face format."""
    like = {name: jax.ShapeDtypeStruct(packings[name].shape, np.float32)}
    return paths.flatten(convert.load(folder, paths.unflatten(like))[0])[name]


def _told(audit: Mapping[str, float], name: str) -> str:
    """The quantization error of each matrix, in a line."""
    worst = sorted(audit, key=audit.get, reverse=True)[:3]
    return (
        f"{len(audit)} matrices in {name}: {100 * np.median(list(audit.values())):.2g} % of their "
        "norm is lost (the median), most of "
        + ", ".join(f"{name} ({100 * audit[name]:.2g} %)" for name in worst)
    )


def check_processors(config: Any, dataset: Dataset) -> None:
    """Raise ConfigError if the ids of `config.init`'s tokenizer differ from those of the data."""
    folder = dataset.processors.get("tokenizer")
    if not isinstance(config.init, str) or not config.init or folder is None:
        return
    source = _tokenizer(config.init)
    if (
        _has_tokenizer(source)
        and load_tokenizer(source).get_vocab() != load_tokenizer(folder).get_vocab()
    ):
        raise ConfigError(
            f"config.init={config.init!r} was trained with another vocabulary: its embeddings "
            f"would stand for other tokens. Set --config.tokenizer.name={source}"
        )


def check_head(config: Any, labels: Sequence[str]) -> None:
    """Raise ConfigError for a head of `config.init` that was made for other classes than `labels`,
    or for another number, unless `config.new_head` leaves it out.

    `config.data.classes` states what each output of the head means in the data; names are compared
    where it is empty.
    """
    if not isinstance(config.init, str) or not config.init or config.new_head:
        return
    if is_run(config.init):
        meta = checkpointer.load_meta(config.init)
        has, names = _described(meta, config.init)[1].get("classes", {}), _labels(meta)
        several = configs.load(str(Path(config.init, "config.json"))).data.format == "labels"
    else:
        source = convert.find(config.init)
        has, names = convert.describe(source)[1].get("classes", {}), convert.labels(source)
        several = convert.several_labels(source)
    wanted = requirements.heads(config.objectives.to_dict(), labels)
    if "classify" in wanted.keys() & has.keys() and several != (config.data.format == "labels"):
        kind, form = ("several labels", "labels") if several else ("one class", "classes")
        raise ConfigError(
            f"config.init={config.init!r} has a head 'classify' for {kind} an example, but "
            f"config.data.format={config.data.format!r}. Set it to {form!r} to go on with the "
            "head, or config.new_head=True to start a new one."
        )
    for head in wanted.keys() & has.keys():
        same = names == tuple(labels) or not (names and labels) or config.data.classes
        if has[head] == wanted[head] and same:
            continue
        told = lambda number, names: f"{number} outputs" + f" ({', '.join(names)})" * bool(names)
        classes = "config.data.classes=<those of the data, in the order of its outputs>"
        raise ConfigError(
            f"config.init={config.init!r} has a head {head!r} with {told(has[head], names)}, the "
            f"data need {told(wanted[head], labels)}. Set config.new_head=True to start a new one"
            + (f", or {classes} to go on with it." if has[head] == wanted[head] else ".")
        )
