"""From a config to the parts of a run, built and checked, with nothing computed yet."""

import functools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax import adapters, build, data
from fmjax import objectives as losses
from fmjax.config import load as configs
from fmjax.config import rules
from fmjax.data.settings import DataSettings, read
from fmjax.distributed import agreement
from fmjax.errors import ConfigError
from fmjax.models import AnyModel, param_init
from fmjax.objectives import requirements
from fmjax.params import groups, paths, sharding
from fmjax.training import flops, initialize, optim, state
from fmjax.training.state import TrainState


class Run(NamedTuple):
    """Every part of a run that the loop uses, nothing computed yet."""

    config: Any
    mesh: jax.sharding.Mesh
    dataset: data.Dataset | None  # None until it is prepared
    model: AnyModel
    objectives: list[losses.Objective]
    assigned: dict[str, str]  # parameter name -> group
    optimizer: optim.Optimizer
    abstract: TrainState
    total: int  # steps
    steps: Callable[[Any], int]  # duration -> steps

    def split(self, params: Any) -> tuple[Any, Any]:
        return groups.split(params, self.assigned)

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, sharding.BATCH)


def setup(config: Any, mesh: jax.sharding.Mesh, poll: Callable[[], None] = lambda: None) -> Run:
    """Builds and checks all parts of a run; compiles nothing. `poll` may raise while data is read.

    Everything is put together once before the data is prepared, with stand-ins for what only data
    can tell, so that a mistake in the config is not found hours later.
    """
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    config = initialize.resolved(config)
    size = config.tokenizer.vocab_size if config.tokenizer.name == "train" else 8
    none = np.zeros(size, bool)
    marks = dict(sentinels=range(size), fim=(4, 5, 6))
    stand_in = data.Vocab(size, 0, 1, (2,), (3,), none, none, **marks)
    labels = tuple(config.data.classes) or ("one", "other")
    # An upper bound of the steps in the unit of the run's length, next to nothing in the others, so
    # that no duration looks longer than the run.
    unit = rules.duration(config.total)[1]
    rows = config.batch_size * 2**30 if unit == "epoch" else 1
    tokens = rows if unit == "token" else rows * 2**40
    assemble(config, mesh, stand_in, labels, rows=rows, tokens=tokens, flops=1)

    rows = config.model.get("vocab_size") if config.init else None
    dataset = data.prepare(
        config.data.to_dict(), config.tokenizer.to_dict(), embedding_rows=rows, poll=poll
    )
    agreement.check_data(dataset)
    initialize.check_tokenizer(config, dataset.tokenizer_dir)
    return with_data(config, mesh, dataset)


def with_data(config: Any, mesh: jax.sharding.Mesh, dataset: Any) -> Run:
    """The run on these data, as long as the config says."""
    size = sizes(config, dataset.splits["train"])
    make = functools.partial(assemble, config, mesh, dataset.vocab, dataset.labels, **size)
    run = make(flops=1)._replace(dataset=dataset)
    losses.check_phases(run.objectives, run.total)
    build.check_types(run.model, dataset.types)
    if rules.duration(config.total)[1] != "flop":
        return run
    return make(flops=flops.of_step(run, batch_spec(run)))._replace(dataset=dataset)


def sizes(config: Any, train: Any) -> dict[str, Any]:
    """Rows and real tokens of an epoch."""
    rows = data.check_drawn(train, config.data.examples)
    return dict(rows=rows, tokens=max(train.tokens * rows // len(train), 1))


def assemble(
    config: Any,
    mesh: jax.sharding.Mesh,
    vocab: data.Vocab,
    labels: Sequence[str],
    *,
    rows: int,
    tokens: int,
    flops: int,
) -> Run:
    """All parts of a run but its data, of which the training split has `rows` and real `tokens`,
    and the classes the names `labels`; a step takes so many `flops`."""
    sizes = dict(
        steps_per_epoch=Fraction(rows, config.batch_size),
        tokens_per_step=Fraction(config.batch_size * tokens, rows),
        flops_per_step=flops,
    )
    total = configs.steps(config.total, total=None, **sizes)
    steps = functools.partial(configs.steps, total=total, **sizes)
    settings = read(DataSettings, config.data.to_dict(), "data")
    if settings.unlabelled:
        raise ConfigError(
            "config.data.label is empty, so that there is nothing to train on: name the column of "
            f"the labels of config.data.format={settings.format}."
        )
    if settings.room < (needed := requirements.room(config.objectives)):
        raise ConfigError(
            f"config.objectives adds {needed} tokens to a document, but config.data.room="
            f"{settings.room} leaves no room for them behind each: set it to {needed}."
        )
    vocab = vocab._replace(start_id=config.model.get("start_id"))
    objectives = losses.build(
        config.objectives.to_dict(), target=settings.target, vocab=vocab, steps=steps
    )
    optimizers = config.optim.to_dict(), config.group_optim.to_dict()
    for objective in objectives:
        if objective.whole_batch and config.accumulate > 1:
            raise ConfigError(
                f"config.accumulate={config.accumulate}: the loss of config.objectives."
                f"{objective.name} compares all examples of a batch, and a microbatch has fewer. "
                "Set it to 1; config.model.remat=block saves memory, too."
            )
    model, assigned = grouped(build.model(config, vocab.size, labels), config.groups, *optimizers)
    _check_noise(config, model)
    _check_balance(config, model)
    _check_prompt(config)
    split = functools.partial(groups.split, assigned=assigned)
    optimizer = optim.make(
        split(param_init.abstract_params(model))[0],
        assigned,
        steps=steps,
        depths={"": model.cfg.depth},
        optim=optimizers[0],
        group_optim=optimizers[1],
    )
    abstract = state.abstract(model, optimizer.tx, split, mesh)
    return Run(config, mesh, None, model, objectives, assigned, optimizer, abstract, total, steps)


def beside(run: Run, config: Any) -> Run:
    """The run of another config with the data of `run`, for which it says the same."""
    return with_data(initialize.resolved(config), run.mesh, run.dataset)


def _check_noise(config: Any, model: AnyModel) -> None:
    """Raise ConfigError if a text would be compared with itself and nothing tells the two apart."""
    alone = len(read(DataSettings, config.data.to_dict(), "data").column_names) == 1
    if "contrast" in config.objectives and alone and not model.cfg.dropout:
        raise ConfigError(
            "config.objectives.contrast with a single column of texts compares each with itself "
            "under another dropout (SimCSE), but config.model.dropout is 0: set it to 0.1, or give "
            "pairs, config.data.columns=a,b."
        )


def _check_balance(config: Any, model: AnyModel) -> None:
    """Raise ConfigError if experts would be balanced over parts of a batch, which is not to balance
    them over it."""
    names = ("experts", "router_aux_loss", "router_z_loss")
    experts, *factors = (getattr(model.cfg, name, 0) for name in names)
    if experts and any(factors) and config.accumulate > 1:
        raise ConfigError(
            f"config.accumulate={config.accumulate}: the losses of the routers "
            "(config.model.router_aux_loss, config.model.router_z_loss) compare all tokens of a "
            "batch, and a microbatch has fewer. Set it to 1, or both of them to 0; "
            "config.model.remat=block saves memory, too."
        )


def _check_prompt(config: Any) -> None:
    """Raise ConfigError if a head takes the mean over tokens and the state of a prompt would be
    among them."""
    means = [name for name, args in config.objectives.items() if args.get("pool") == "mean"]
    if config.adapter.get("whole") == "prompt" and means:
        raise ConfigError(
            "config.adapter.whole='prompt' puts the state of the prompt's first vector in the "
            f"place of the first token's, but config.objectives.{means[0]}.pool='mean' takes all: "
            "set one of them to 'token' or 'first'."
        )


def grouped(
    model: AnyModel, patterns: Any, optim_: Mapping[str, Any], group_optim: Mapping[str, Any]
) -> tuple[AnyModel, dict[str, str]]:
    """The model, stacked where neighbouring layers train alike, and {parameter name: group}."""
    canonical = model.clone(stacks=paths.runs(model.kinds))
    names = list(paths.unstack(param_init.abstract_params(canonical)))
    assigned = groups.assign(names, patterns)
    adapters.check_frozen(canonical, groups.trained(assigned))
    stacks = None
    if model.cfg.scan:
        stacks = groups.stacks(model.kinds, assigned, optim_, group_optim)
    return model.clone(stacks=stacks), assigned


def batch_spec(run: Run, width: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layout of one global training batch with `width` columns (None: all)."""
    split = run.dataset.splits["train"]
    rows = split.rows(np.zeros(1, np.int64)) | {"index": np.zeros(1, np.int32)}
    if width is not None:
        rows = data.cut(rows, width)
    return {
        name: jax.ShapeDtypeStruct(
            (run.config.batch_size, *x.shape[1:]), x.dtype, sharding=run.batch_sharding
        )
        for name, x in rows.items()
    }
