"""Objectives: one file a loss; this file composes them.

An objective module has one to eight pure functions:

    prepare(batch, seeds, **args) -> batch             corrupts the batch (masking)
    loss_fn(apply, params, batch, **args) -> metrics   {name: (sum, weight)}, "loss" is minimised
    features(apply, params, batch, **args) -> arrays   {name: (B, …)}, of each example by itself
    compare(features, batch, **args) -> metrics        in place of `loss_fn`: of a whole batch
    outputs(apply, params, batch, **args) -> arrays    {name: (B, …)}, what it says of each example
    guesses(apply, params, batch) -> arrays            {name: (B, …)}, what it makes of a corruption
    score(outputs, labels) -> {metric: number}         of a whole split, on the host
    each(outputs, labels) -> {metric: (N,)}            what its mean of that name is the mean of
    describe(outputs) -> [{…}, …]                      each example's outputs as a person reads them

All are optional but `loss_fn`, or `features` and `compare` in its place for losses in which the
examples of a batch are compared: these are exact under accumulation too, since only features of
the whole batch are kept at once (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup"). `apply(params, *arrays, method=…)` runs a method of the model, or
"encode_routed" (`fmjax.build.apply`); `batch["seeds"]` is there while training and turns dropout
on. Sums are divided only once, by the weight of the whole batch, so that padding, accumulation and
the number of devices cannot change a number. Arguments are what `config.objectives.<name>` holds
plus facts about the data (the vocabulary) that a function asks for by name; what it holds under
`validation` are those of `prepare` in evaluation, where they differ, as for losses that compare.
`score` and `describe` may ask for `names` (of the classes), `split` (the data) and `rows` (numbers
of its rows, one for each of the outputs), `describe` for `words`, how many a record has. A module
also says what it needs: `TARGET`, what the labels of the data must mean
(`fmjax.data.Dataset.target`, a fact too), or a tuple of what they may; `heads(labels)`, the linear
heads of the model; `SCORES`, the metrics of `score`; `VOCABULARY`, that the model needs its
vocabulary head;
`DECODES`, that it needs a decoder after its encoder; `CAUSAL`, whether a token of the model may
see only what is before it; `PREFIX`, that those of type 1 are seen by all of their document
(`Config.prefix` of decoders, which an argument `prefix` asks for too); `MASKS`, that the tokenizer
needs a token for what is hidden; `FIM`, those that mark a middle to fill in; `ROOM`, how many
tokens it adds to a document; `DURATIONS`, arguments that are several of them, which it is given in
steps. A `prepare` that asks for `step` is given that of the run, and None in evaluation.

What an objective holds as `start` and `stop`, durations, says between which steps it is learnt.
Those that are learnt at once share a forward pass, but for those that read a decoder's documents in
both directions (`PREFIX`, `prefix`), each of which has its own, with its own corruption.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmjax.errors import ConfigError, did_you_mean
from fmjax.objectives import requirements
from fmjax.params import randomness

Metrics = dict[str, tuple[jax.Array, jax.Array]]
FUNCTIONS = (
    "prepare",
    "loss_fn",
    "features",
    "compare",
    "outputs",
    "guesses",
    "score",
    "each",
    "describe",
)
ABOUT_SPLITS = ("names", "split", "rows", "words")  # what `score` and `describe` may ask for


class Objective(NamedTuple):
    """One objective with its arguments bound."""

    name: str
    weight: float
    prepare: Callable | None  # of a training batch
    loss_fn: Callable
    outputs: Callable | None = None
    guesses: Callable | None = None
    score: Callable | None = None
    each: Callable | None = None
    describe: Callable | None = None
    scores: tuple[str, ...] = ()  # names of what `score` gives
    features: Callable | None = None  # of each example; None: the loss is one of single examples
    compare: Callable | None = None  # the metrics of the features of a whole batch
    prepare_validation: Callable | None = None
    start: int = 0  # the first step that it is learnt in
    stop: int | None = None  # the first that it is not any more
    apart: bool = False  # whether it needs a forward pass without the others

    @property
    def whole_batch(self) -> bool:
        """True if the loss of an example depends on the others of its batch."""
        return self.compare is not None


def build(
    objectives: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
    steps: Callable[[Any], int] | None = None,
) -> list[Objective]:
    """Import each named objective and bind its arguments.

    `facts` are those of the data (`fmjax.data.Dataset.facts`); `steps` turns durations into steps,
    where there is a run.

    Raises ConfigError for an argument that the objective does not take, and for data that it cannot
    use.
    """
    return [_bind(name, dict(args), steps, facts) for name, args in objectives.items()]


def _bind(
    name: str,
    args: dict[str, Any],
    steps: Callable[[Any], int] | None,
    facts: Mapping[str, Any],
) -> Objective:
    module = requirements.module_of(name, args)
    args.pop("module", None)
    requirements.check_target(name, getattr(module, "TARGET", ""), facts["target"])
    if getattr(module, "VOCABULARY", False) and "vocab" not in facts:
        raise ConfigError(
            f"config.objectives.{name} predicts tokens, and the data of config.data.format have "
            "none."
        )
    if getattr(module, "MASKS", False) and facts["vocab"].mask_id is None:
        raise ConfigError(
            f"config.objectives.{name} needs a tokenizer with a mask token: set "
            "config.tokenizer.name to a BERT-like one or to 'train', or config.objectives to clm."
        )
    if getattr(module, "FIM", False) and facts["vocab"].fim is None:
        raise ConfigError(
            f"config.objectives.{name} needs a tokenizer with tokens that mark a prefix, a middle "
            "and a suffix: set config.tokenizer.name to one of a model for code, or to 'train' "
            "with config.tokenizer.special=fim."
        )
    weight, differs = args.pop("weight", 1.0), args.pop("validation", {})
    ends = args.pop("start", 0), args.pop("stop", None)
    start, stop = (x if x is None else steps(x) for x in ends) if steps else (0, None)
    for arg in getattr(module, "DURATIONS", ()):
        if arg in args:
            args[arg] = tuple(map(steps, args[arg])) if steps else ()
    functions = {key: getattr(module, key) for key in FUNCTIONS if hasattr(module, key)}
    takes = {key: _asks_for(function) for key, function in functions.items()}
    possible = {arg for names in takes.values() for arg in names} - {*ABOUT_SPLITS, "step"}
    for arg in args:
        if arg not in possible or arg in facts:
            raise ConfigError(
                f"config.objectives.{name}.{arg} is not known."
                + did_you_mean(
                    arg, (possible - set(facts)) | {"weight", "validation", "start", "stop"}
                )
            )
    if wrong := set(differs) - set(takes.get("prepare", ())) | set(differs) & set(facts):
        raise ConfigError(
            f"config.objectives.{name}.validation.{min(wrong)} is not known: in evaluation only "
            "how examples are corrupted may differ."
            + did_you_mean(min(wrong), set(takes.get("prepare", ())) - set(facts))
        )

    def bind(key: str, given: Mapping[str, Any]) -> Callable:
        own = {arg: given[arg] for arg in takes[key] if arg in given}
        return functools.partial(functions[key], **own)

    bound = {key: bind(key, {**facts, **args}) for key in takes}
    if "prepare" in takes:
        bound["prepare_validation"] = bind("prepare", {**facts, **args, **differs})
    if "compare" in bound:
        bound["loss_fn"] = functools.partial(_compared, bound["features"], bound["compare"])
    return Objective(
        name,
        weight,
        bound.get("prepare"),
        bound["loss_fn"],
        bound.get("outputs"),
        bound.get("guesses"),
        bound.get("score"),
        bound.get("each"),
        bound.get("describe"),
        getattr(module, "SCORES", ()),
        bound.get("features"),
        bound.get("compare"),
        bound.get("prepare_validation"),
        start,
        stop,
        bool(args.get("prefix")) or getattr(module, "PREFIX", False),
    )


def _compared(features: Callable, compare: Callable, apply, params, batch) -> Metrics:
    """The `loss_fn` of an objective that compares the examples of a batch."""
    return compare(features(apply, params, batch), batch)


def phases(objectives: list[Objective]) -> tuple[list[int], list[list[Objective]]]:
    """(the steps at which others are learnt, those before the first, …, from the last on)."""
    cuts = {o.start for o in objectives} | {o.stop for o in objectives if o.stop is not None}
    cuts = sorted(cuts - {0})
    learnt = [
        [o for o in objectives if o.start <= first and (o.stop is None or first < o.stop)]
        for first in (0, *cuts)
    ]
    return cuts, learnt


def check_phases(objectives: list[Objective], total: int) -> None:
    """Raise ConfigError for an objective that is never learnt, and for a run of `total` steps that
    in some of them learns nothing."""
    for one in objectives:
        if one.stop is not None and one.stop <= one.start:
            raise ConfigError(
                f"config.objectives.{one.name} is never learnt: its stop, step {one.stop}, is not "
                f"behind its start, step {one.start}."
            )
    cuts, learnt = phases(objectives)
    for first, last, active in zip((0, *cuts), (*cuts, total), learnt, strict=True):
        if not active and first < min(last, total):
            raise ConfigError(
                f"config.objectives: none of {', '.join(o.name for o in objectives)} is learnt "
                f"from step {first} to {min(last, total)}: see their start and stop."
            )


def _passes(objectives: list[Objective]) -> list[list[Objective]]:
    """Those that share a forward pass."""
    together = [o for o in objectives if not o.apart]
    return [together] * bool(together) + [[o] for o in objectives if o.apart]


def call_with_declared(function: Callable, *arrays: Any, **facts: Any) -> Any:
    """Call `function(*arrays)` with those of the facts that it declares as keywords."""
    return function(*arrays, **{key: facts[key] for key in _asks_for(function) if key in facts})


def _asks_for(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]


def metrics(
    objectives: list[Objective],
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    train: bool,
    step: jax.Array | int | None = None,
    compared: bool = True,
) -> Metrics:
    """All objectives' (sum, weight) metrics as "<objective>/<metric>", on one shared forward pass;
    unless `compared`, without those that compare the examples of a batch.

    Corruptions are applied in order; objectives that then ask for the same method of the same
    arrays share its result.
    """
    found = {}
    for group in _passes(objectives):
        prepared = prepare(group, batch, rng, train, step)
        measured = [o for o in group if compared or not o.whole_batch]
        found |= _metrics(measured, SharedForward(apply), params, prepared)
    return found


def features(
    objectives: list[Objective],
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    step: jax.Array | int | None = None,
) -> dict[str, Any]:
    """{objective: its features} while training, of the objectives that compare them."""
    found = {}
    for group in _passes(objectives):
        prepared, shared = prepare(group, batch, rng, True, step), SharedForward(apply)
        found |= {o.name: o.features(shared, params, prepared) for o in group if o.whole_batch}
    return found


def compare(
    objectives: list[Objective],
    found: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    step: jax.Array | int | None = None,
) -> Metrics:
    """The metrics of the `features` of a whole batch."""
    metrics = {}
    for group in _passes(objectives):
        prepared = prepare(group, batch, rng, True, step)
        for objective in (o for o in group if o.whole_batch):
            of_one = objective.compare(found[objective.name], prepared)
            metrics |= {f"{objective.name}/{name}": value for name, value in of_one.items()}
    return metrics


def evaluation(
    objectives: list[Objective],
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
) -> tuple[Metrics, dict[str, dict[str, jax.Array]]]:
    """(metrics, {objective: its outputs or guesses}) without dropout, on one shared forward
    pass."""
    found, told = {}, {}
    for group in _passes(objectives):
        seen, shared = prepare(group, batch, rng, train=False), SharedForward(apply)
        says = {o.name: o.outputs or o.guesses for o in group if o.outputs or o.guesses}
        told |= {name: function(shared, params, seen) for name, function in says.items()}
        found |= _metrics(group, shared, params, seen)
    return found, told


def outputs_of(
    objectives: list[Objective], apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """{objective: its outputs} of a batch that may have no labels."""
    shared, batch = SharedForward(apply), {**batch, "seeds": None}
    return {o.name: o.outputs(shared, params, batch) for o in objectives if o.outputs}


def _metrics(objectives, apply, params, batch) -> Metrics:
    return {
        f"{objective.name}/{name}": value
        for objective in objectives
        for name, value in objective.loss_fn(apply, params, batch).items()
    }


def prepare(
    objectives: list[Objective],
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    train: bool,
    step: jax.Array | int | None = None,
) -> dict[str, jax.Array]:
    """The batch as the model sees it: every objective's corruption, and `seeds` for dropout."""
    seeds = randomness.seeds(rng, batch["index"])
    batch = dict(batch)
    for objective in objectives:
        corrupt = objective.prepare if train else objective.prepare_validation
        if corrupt:
            seed = randomness.named(seeds, objective.name)
            batch = call_with_declared(corrupt, batch, seed, **({"step": step} if train else {}))
    batch["seeds"] = randomness.named(seeds, "dropout") if train else None
    return batch


def loss(
    objectives: list[Objective], found: Metrics, weights: Mapping[str, jax.Array]
) -> jax.Array:
    """The weighted sum of the objectives' means over `weights` ("<objective>/loss" -> global
    weight).

    An objective without a single target contributes zero.
    """
    total = jnp.zeros((), jnp.float32)
    for objective in objectives:
        key = f"{objective.name}/loss"
        total += objective.weight * found[key][0] / jnp.where(weights[key] > 0, weights[key], 1)
    return total


def mean(found: Mapping[str, Any], objectives: list[Objective]) -> dict[str, float]:
    """Printable means of (sum, weight) metrics on the host, with "loss" the total that is
    minimised; in evaluation, which measures all of them at any step, that of all."""
    resting = tuple(f"{o.name}/" for o in objectives if o.start or o.stop is not None)
    found = {name: x for name, x in found.items() if x[1] or not name.startswith(resting)}
    means = {name: float(s) / float(w) if w else float("nan") for name, (s, w) in found.items()}
    learnt = [o for o in objectives if f"{o.name}/" not in resting or f"{o.name}/loss" in found]
    parts = [(o.weight, means.get(f"{o.name}/loss", float("nan"))) for o in learnt]
    return {"loss": sum(weight * value for weight, value in parts), **means}


class SharedForward:
    """The `apply` of a model that runs a method once for the same arguments: objectives that ask
    for the same states share a forward pass."""

    def __init__(self, apply: Callable):
        self._apply = apply
        self._results: dict[tuple, tuple[Any, Any]] = {}

    def __call__(self, params: Any, *args: Any, method: str, **which: str) -> Any:
        if method == "encode":  # shared with those that also ask for the routing
            return self(params, *args, method="encode_routed", **which)[0]
        leaves, structure = jax.tree.flatten(args)
        key = method, *which.items(), id(params), structure, *map(id, leaves)
        if key not in self._results:
            # Arguments are kept with the result: the id of what is gone may be given again.
            result = self._apply(params, *args, method=method, **which)
            self._results[key] = result, (params, leaves)
        return self._results[key][0]
