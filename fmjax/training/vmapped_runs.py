"""Runs that one program computes, over one base in memory: `config.arms`.

    config.arms = (("seed", (0, 1, 2)),)
    config.arms = (("optim.lr", (1e-3, 3e-3)), ("adapter.rank", (4, 16)))  # two arms, row by row

Runs that differ in a seed, a learning rate, a rank or in what an adapter starts from are the same
program on other numbers. What trains in them is stacked, arm by arm, and the step is mapped over
it; what is frozen is there once, and on an accelerator its products see the rows of all arms at
once (`jax.vmap`). Each arm is the run that its own config says, in a folder of its own: the numbers
are those of that run alone but for the order of floating-point sums, and started from its folder it
continues alone. Batches are as wide as the longest text of all arms needs, and speeds in its log
are those of all together.

A smaller rank is among zeros: a column of A and a row of B that are both zero get no gradient and
stay so. Its scale differs from that of the widest by a factor that B is multiplied with.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax import adapters, build
from fmjax.adapters.lora import Lora
from fmjax.adapters.wrapper import Adapted
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.evaluation import eval_loop
from fmjax.params import groups, paths
from fmjax.training import flops, optim, setup
from fmjax.training.setup import Run
from fmjax.training.state import TrainState
from fmjax.training.step import make_train_step

# Backends on which all arms at once took longer than each by itself (benchmarks/RESULTS.md).
ONE_BY_ONE = ("cpu",)
# Optimizers that move each number by itself, so that zeros around a matrix change nothing.
ELEMENTWISE = ("adam", "adamw", "adamax", "nadam", "nadamw", "adan", "lion", "rmsprop", "sgd")


def prepare(config: Any, mesh: jax.sharding.Mesh, poll: Callable[[], None]) -> "VmappedRuns":
    """The runs of a config, whose data are read once. Raises as `setup.setup` does."""
    first, *others = configs.arms(config)
    run = setup.setup(first, mesh, poll)
    return VmappedRuns((run, *(setup.beside(run, other) for other in others)))


@dataclasses.dataclass(frozen=True, eq=False)
class VmappedRuns:
    """The runs of one program; of a single one everything is as the run itself has it.

    Of several, arrays have an axis of arms in front: in a state what trains, the optimizer and the
    keys, in a batch all, unless the arms share their seed and with it the order of examples.
    """

    runs: tuple[Run, ...]

    def __post_init__(self):
        if not self.alone:
            _check(self.runs)

    @property
    def alone(self) -> bool:
        return len(self.runs) == 1

    @functools.cached_property
    def padded_run(self) -> Run:
        """The run whose arrays have room for those of every other."""
        return max(self.runs, key=lambda run: paths.size(run.split(run.abstract.params)[0]))

    @property
    def seeds(self) -> list[int]:
        """Those of the data: one, or one for each arm."""
        seeds = [run.config.seed for run in self.runs]
        return seeds if len(set(seeds)) > 1 else seeds[:1]

    @property
    def batch_sharding(self) -> NamedSharding:
        place = self.padded_run.batch_sharding
        return _leading(place) if len(self.seeds) > 1 else place

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and layout of a batch of all arms at full width."""
        spec = setup.batch_spec(self.padded_run)
        return self._many(spec) if len(self.seeds) > 1 else spec

    @property
    def abstract(self) -> TrainState:
        like = self.padded_run.abstract
        if self.alone:
            return like
        moving, frozen = self.padded_run.split(like.params)
        many = self._many((moving, like.opt_state, like.rng))
        return _state(like.step, many, frozen)

    def stack(self, states: Sequence[TrainState]) -> TrainState:
        """One state of those of the arms; what is frozen is that of the first."""
        if self.alone:
            return states[0]
        like, each = self._own(self.padded_run.abstract), [self._own(one) for one in states]
        stack = lambda like, *parts: jnp.stack([_grown(part, like.shape) for part in parts])
        places = jax.tree.map(lambda x: _leading(x.sharding), like)
        whole = jax.jit(lambda *each: jax.tree.map(stack, like, *each), out_shardings=places)
        return _state(states[0].step, whole(*each), self.padded_run.split(states[0].params)[1])

    def unstack(self, state: TrainState, arm: int) -> TrainState:
        """The state of one arm, with the shapes of its own run."""
        if self.alone:
            return state
        run = self.runs[arm]
        own = self._cut(run.model)(self._own(state), np.int32(arm))
        return _state(state.step, own, run.split(state.params)[1])

    @functools.cache  # noqa: B019  (compiled once a shape; there is one of these in a process)
    def _cut(self, model: Any) -> Callable:
        """A function that slices the part of an arm with this `model`."""
        run = next(run for run in self.runs if run.model == model)
        like = self._own(run.abstract)
        places = jax.tree.map(lambda x: x.sharding, like)
        cut = lambda arm, like, x: x[arm][tuple(map(slice, like.shape))]
        parts = lambda whole, arm: jax.tree.map(functools.partial(cut, arm), like, whole)
        return jax.jit(parts, out_shardings=places)

    def one(self, tree: Any, arm: int) -> Any:
        """One arm's slice of `tree`, with a leading axis of arms in every leaf; without an arm,
        all."""
        return tree if self.alone else jax.tree.map(lambda x: x[arm], tree)

    @property
    def numbers(self) -> Sequence[int | None]:
        """Those of the arms; None of a run that is alone."""
        return [None] if self.alone else range(len(self.runs))

    def measured(self, totals: Mapping[str, Any], kept: list[Any], arm: int) -> tuple[Any, Any]:
        """One arm's part of the result of `eval_loop.collect`."""
        if self.alone:
            return totals, kept
        return {name: pair[:, arm] for name, pair in totals.items()}, self.one(kept, arm)

    def batch(self, batch: Mapping[str, Any], arm: int) -> Mapping[str, Any]:
        return self.one(batch, arm) if len(self.seeds) > 1 else batch

    def train_step(self) -> Callable:
        """As `step.make_train_step`; metrics have the axis of arms."""
        run = self.padded_run

        def step_of(apply, tx):
            return make_train_step(apply, run.objectives, tx, run.split, run.config.accumulate)

        if self.alone:
            return step_of(build.apply(run.model), run.optimizer.tx)

        def step(state, batch):
            frozen = run.split(state.params)[1]

            def one(values, own, batch):
                before = _state(state.step, own, frozen)
                after, found = step_of(self._apply(values), self._tx(values))(before, batch)
                return self._own(after), found

            each = self._values, self._own(state)
            if len(self.seeds) > 1:
                own, found = _mapped(one, *each, batch)
            else:
                own, found = _mapped(lambda *each: one(*each, batch), *each)
            return _state(state.step + 1, own, frozen), found

        return step

    def eval_step(self) -> Callable:
        """As `evaluate.make_step`, of the stored `params` of all arms on the same batch."""
        run = self.padded_run
        if self.alone:
            return eval_loop.make_step(build.apply(run.model), run.objectives)

        def step(params, batch, rng):
            moving, frozen = run.split(params)

            def one(values, moving):
                step = eval_loop.make_step(self._apply(values), run.objectives)
                return step(groups.merge(moving, frozen), batch, rng)

            return _mapped(one, self._values, moving)

        return step

    def flops(
        self, batch: Mapping[str, jax.ShapeDtypeStruct], traced: jax.stages.Traced
    ) -> list[int]:
        """FLOPs of a step of each arm, given the program of all that was traced for such a
        batch."""
        own = jax.eval_shape(lambda batch: self.batch(batch, 0), dict(batch))
        single = setup.batch_spec(self.padded_run, own)
        number, models = len(self.runs), {run.model for run in self.runs}
        if self.alone or len(models) == 1 and jax.default_backend() in ONE_BY_ONE:
            return [flops.of_step(self.padded_run, single, traced, number)] * number
        found: dict[Any, int] = {}
        for run in self.runs:
            if run.model not in found:
                found[run.model] = flops.of_step(run, single)
        return [found[run.model] for run in self.runs]

    def _own(self, state: TrainState) -> tuple[Any, Any, Any]:
        """The part of a state that each arm has for itself."""
        return self.padded_run.split(state.params)[0], state.opt_state, state.rng

    def _many(self, like: Any) -> Any:
        def many(x):
            shape = len(self.runs), *x.shape
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=_leading(x.sharding))

        return jax.tree.map(many, like)

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        """The numbers in which the arms differ, an array of each: of the optimizer by their keys,
        and by the path of each lora_b what it is multiplied with."""
        settings = [configs.flatten(run.config) for run in self.runs]
        own = r"(optim|group_optim\..*)\.(lr|weight_decay)"
        rates = [key for key in settings[0] if re.fullmatch(own, key)]
        found = {key: [one[key] for one in settings] for key in rates}
        widest, scales = _scales(self.padded_run), [_scales(run) for run in self.runs]
        found |= {path: [one[path] / widest[path] for one in scales] for path in widest}
        different = {key: values for key, values in found.items() if len(set(values)) > 1}
        return {key: np.array(values, np.float32) for key, values in different.items()}

    def _apply(self, values: Mapping[str, jax.Array]) -> Callable:
        apply = build.apply(self.padded_run.model)

        def scaled(params, *args, **which):
            flat = paths.flatten(params)
            flat |= {path: flat[path] * values[path] for path in flat.keys() & values.keys()}
            return apply(paths.unflatten(flat), *args, **which)

        return scaled

    def _tx(self, values: Mapping[str, jax.Array]) -> Any:
        run = self.padded_run
        settings = run.config.to_dict()
        for key, value in values.items():
            if key.startswith(("optim.", "group_optim.")):
                *sections, name = key.split(".")
                functools.reduce(dict.__getitem__, sections, settings)[name] = value
        return optim.make(
            run.split(run.abstract.params)[0],
            run.assigned,
            steps=run.steps,
            depths=paths.layer_counts(run.model.kinds),
            optim=settings["optim"],
            group_optim=settings["group_optim"],
        ).tx


def _check(runs: Sequence[Run]) -> None:
    """Raise ConfigError for runs whose frozen parameters or programs are not the same."""
    first = runs[0]
    differ = lambda key: len({run.config.adapter.get(key) for run in runs}) > 1
    differs = [key for key in ("rank", "alpha", "init", "text") if differ(key)]
    moving = set(groups.trained(first.assigned))
    kept = [n for n in first.assigned if n not in moving and re.fullmatch(adapters.LEAVES, n)]
    if kept and (differs or len({run.config.seed for run in runs}) > 1):
        raise ConfigError(
            f"config.arms: {kept[0]} belongs to an adapter and is frozen, but arms share what is "
            "frozen and differ in how it begins. Let it train, or start a run for each."
        )
    if any(adapters.changes_base(run.model) for run in runs):
        sites = first.model.sites()
        both = [path for path, site in sites.items() if f"{path}/{site.weight}" in moving]
        if differs or both:
            raise ConfigError(
                "config.arms: config.adapter.init='pissa' and 'loftq' take a part out of the base, "
                f"which the arms share, but they differ in {differs or both}: set config.adapter."
                "init='uniform', or start a run for each."
            )
    if len(totals := {run.total for run in runs}) > 1:
        raise ConfigError(
            f"config.arms: with config.total={first.config.total!r} the arms have {sorted(totals)} "
            "steps, since their steps take more or fewer operations. Give steps, epochs or tokens, "
            "or start a run for each."
        )
    shapes = [paths.flatten(run.abstract.params).keys() for run in runs]
    if any(one != shapes[0] for one in shapes):
        raise ConfigError(
            "config.arms: with a rank of its own in config.adapter.targets, layers are stacked in "
            "another way for each rank: leave it out there (None), or set config.model.scan=False."
        )
    config = first.config
    used = [config.optim.name, *(g["name"] for g in config.group_optim.values() if "name" in g)]
    whole = [name for name in used if name not in ELEMENTWISE]
    if "rank" in differs and whole:
        raise ConfigError(
            f"config.arms has several ranks, but the optimizer {whole[0]!r} looks at a matrix as a "
            f"whole, so that its size counts. Possible are {', '.join(ELEMENTWISE)}; or start a "
            "run for each rank."
        )


def _mapped(function: Callable, *each: Any) -> Any:
    """`function` over the first axis of all arguments."""
    if jax.default_backend() in ONE_BY_ONE:
        return jax.lax.map(lambda one: function(*one), each)
    return jax.vmap(function)(*each)


def _state(step: Any, own: tuple[Any, Any, Any], frozen: Any) -> TrainState:
    moving, opt_state, rng = own
    return TrainState(step, groups.merge(moving, frozen), opt_state, rng)


def _scales(run: Run) -> dict[str, float]:
    """{stored path of lora_b: the scale of its module}."""
    model = run.model
    if not (isinstance(model, Adapted) and isinstance(model.adapter, Lora)):
        return {}
    places = model.places(run.abstract.params)
    return {f"{path}/lora_b": site.scale for path, site in places.items()}


def _grown(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x` among zeros."""
    if x.shape == tuple(shape):
        return x
    return jnp.pad(x, [(0, wide - own) for wide, own in zip(shape, x.shape, strict=True)])


def _leading(place: NamedSharding) -> NamedSharding:
    """The place of arrays with this layout, after an axis that is not cut."""
    return NamedSharding(place.mesh, P(None, *place.spec))
