"""From a config to the parts of a run, built and checked, with nothing computed yet."""

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fmjax import adapters, build, data
from fmjax import objectives as losses
from fmjax.config import load as configs
from fmjax.config import rules
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
    sections = config.data.to_dict(), config.get("tokenizer", ConfigDict()).to_dict()
    # An upper bound of the steps in the unit of the run's length, next to nothing in the others, so
    # that no duration looks longer than the run.
    length = rules.duration(config.total)[1]
    rows = config.batch_size * 2**30 if length == "epoch" else 1
    units = rows if length not in rules.LENGTHS else rows * 2**40
    assemble(config, mesh, data.stand_in(*sections), rows=rows, units=units, flops=1)

    embedding_rows = config.model.get("vocab_size") if config.init else None
    dataset = data.prepare(*sections, embedding_rows=embedding_rows, poll=poll)
    agreement.check_data(dataset)
    initialize.check_processors(config, dataset)
    return with_data(config, mesh, dataset)


def with_data(config: Any, mesh: jax.sharding.Mesh, dataset: data.Dataset) -> Run:
    """The run on these data, as long as the config says."""
    make = functools.partial(assemble, config, mesh, dataset, **sizes(config, dataset))
    run = make(flops=1)._replace(dataset=dataset)
    losses.check_phases(run.objectives, run.total)
    build.check_types(run.model, dataset.facts.get("types", 1))
    if rules.duration(config.total)[1] != "flop":
        return run
    return make(flops=flops.of_step(run, batch_spec(run)))._replace(dataset=dataset)


def sizes(config: Any, dataset: data.Dataset) -> dict[str, int]:
    """Rows and units of an epoch."""
    train = dataset.splits["train"]
    rows = data.check_drawn(train, config.data.examples)
    return dict(rows=rows, units=max(train.unit_count * rows // len(train), 1))


def assemble(
    config: Any,
    mesh: jax.sharding.Mesh,
    dataset: data.Dataset,
    *,
    rows: int,
    units: int,
    flops: int,
) -> Run:
    """All parts of a run but its data: `dataset` may be a stand-in. An epoch has `rows` and
    `units`; a step takes so many `flops`."""
    sizes = dict(
        steps_per_epoch=Fraction(rows, config.batch_size),
        units_per_step=Fraction(config.batch_size * units, rows),
        flops_per_step=flops,
        unit=dataset.unit,
    )
    total = configs.steps(config.total, total=None, **sizes)
    steps = functools.partial(configs.steps, total=total, **sizes)
    facts, goals = dataset.facts, config.objectives.to_dict()
    if "vocab" in facts:  # of an encoder–decoder the model says what its targets begin with
        facts["vocab"] = facts["vocab"]._replace(start_id=config.model.get("start_id"))
    objectives = losses.build(goals, facts, steps)
    optimizers = config.optim.to_dict(), config.group_optim.to_dict()
    model, assigned = grouped(build.model(config, facts), config.groups, *optimizers)
    requirements.check_facts(goals, facts | {"dropout": getattr(model.cfg, "dropout", 0.0)})
    _check_balance(config, model)
    _check_prompt(config)
    split = functools.partial(groups.split, assigned=assigned)
    optimizer = optim.make(
        split(param_init.abstract_params(model))[0],
        assigned,
        steps=steps,
        depths=paths.layer_counts(model.kinds),
        optim=optimizers[0],
        group_optim=optimizers[1],
    )
    abstract = state.abstract(model, optimizer.tx, split, mesh)
    return Run(config, mesh, None, model, objectives, assigned, optimizer, abstract, total, steps)


def beside(run: Run, config: Any) -> Run:
    """The run of another config with the data of `run`, for which it says the same."""
    return with_data(initialize.resolved(config), run.mesh, run.dataset)


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
    canonical = model.clone(stacks=paths.kind_runs(model.kinds))
    names = list(paths.unstack(param_init.abstract_params(canonical)))
    assigned = groups.assign(names, patterns)
    adapters.check_frozen(canonical, groups.trained(assigned))
    stacks = None
    if model.cfg.scan:
        stacks = groups.stacks(model.kinds, assigned, optim_, group_optim)
    return model.clone(stacks=stacks), assigned


def shapes(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of each array of a batch: each such tuple has a program of its own."""
    return tuple((name, tuple(batch[name].shape)) for name in sorted(batch))


def batch_spec(run: Run, batch: Mapping[str, Any] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layout of one global training batch: of one as `batch`, or of full width."""
    arrays = data.full_row(run.dataset.splits["train"]) if batch is None else batch
    rows = run.config.batch_size
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=run.batch_sharding)
        for name, x in arrays.items()
    }
