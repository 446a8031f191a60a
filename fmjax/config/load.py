"""Configs: Python files and saved JSON in, checked and locked `ConfigDict`s out.

A config file is code that defines `get_config(arg=None)`; only local `.py` files named by the user
are executed. A saved `config.json` is data. After `load` a config holds nothing but numbers, text,
booleans, None, tuples (lists become tuples) and dicts, so JSON keeps all of it. Nothing here
imports jax: a mistake on the command line is answered at once.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fmjax.config import command_line, constraints, files, plugins, rules
from fmjax.config.values import flatten, plain
from fmjax.errors import ConfigError, FmjaxError, did_you_mean, quoted

# What may differ between two starts of one run, and is therefore not part of its identity: where it
# runs, how often it speaks and saves, what is measured beside it, and which task reads it. None of
# these changes the numbers beyond the order of floating-point sums; data.skip only those of steps
# that are still to come.
MAY_CHANGE = (
    "task",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "keep_best",
    "best",
    "max_skipped",
    "ledger",
    "benchmarks",
    "pretraining",
    "samples",
    "cache_prefix",
    "tensorboard",
    "wandb",
    "mesh",
    "distributed",
    "data.skip",
    "data.cache",
    "data.workers",
)
SECRET = re.compile(
    r"(^|_)(token|(api)?key|secret|passw(or)?d|passphrase|credential)s?($|_)", re.IGNORECASE
)
ABSENT = "(absent)"
TRIALS = "expected a list with a {key: value} for each trial; see fmjax/experiments/sweep.py"


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked, checked config of `path.py`, `path.py:arg` or `config.json`, then overrides.

    Args:
      spec: a local file, with the argument of its `get_config` after a colon.
      overrides: command-line words, `--config.a.b=v` or `--config.a.b v`. A value is read as the
        type of the default that it replaces; tuples and dicts are Python literals.

    Raises:
      ConfigError: names the key, what was given, what is possible.
    """
    path, _, arg = spec.partition(":")
    config, overrides = _read(Path(path), arg or None), list(overrides)
    command_line.apply(config, overrides)
    config = _checked(config)
    if path.endswith(".py"):
        plugins.trust(flatten(config).items())
    plugins.trust((word.partition("=")[0], word.partition("=")[2]) for word in overrides)
    return config


def sweep(spec: str) -> list[dict[str, Any]] | Generator:
    """The result of `get_sweep(arg=None)` of `path.py` or `path.py:arg`: {key: value} for each
    trial, or a generator of them that is sent the record of each (`fmjax.experiments.trials`).

    Raises ConfigError where there is none.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    _check_file(path)
    with located(path):
        found = _call(path, "get_sweep", arg or None)
    if inspect.isgenerator(found):
        return found
    if not isinstance(found, Sequence) or not found:
        raise ConfigError(f"--config={path}: get_sweep gave {quoted(found)}, {TRIALS}")
    return [settings(path, row) for row in found]


def defines(spec: str, name: str) -> bool:
    """True if the config file of `spec` defines a function of this name."""
    path = Path(spec.partition(":")[0])
    _check_file(path)
    with located(path):
        return path.suffix == ".py" and callable(runpy.run_path(str(path)).get(name))


def expected(spec: str) -> list[Any]:
    """The result of `get_expected(arg=None)` of `path.py` or `path.py:arg`, see
    fmjax/experiments/evidence.py.

    Raises ConfigError where there is none.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    _check_file(path)
    with located(path):
        return _call(path, "get_expected", arg or None)


def settings(path: str | os.PathLike, trial: Any) -> dict[str, Any]:
    """The settings of a trial of a sweep, with numpy's numbers as Python's.

    Raises ConfigError for what is no {key: value}.
    """
    if not isinstance(trial, Mapping) or not all(isinstance(key, str) for key in trial):
        raise ConfigError(f"--config={path}: get_sweep gave {quoted(trial)}, {TRIALS}")
    own = lambda value: value.item() if hasattr(value, "item") else value
    return {key: own(value) for key, value in trial.items()}


def changes(config: ConfigDict, file: str | os.PathLike) -> list[tuple[str, Any, Any]]:
    """(key, default, value) in which a config differs from what its `file` says; no secrets."""
    return diff(redact(load(str(file))), redact(config))


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """The argument of a `get_config`, as in big_vision: "tiny", "tiny,runlocal", "res=128".

    The first default may be given by its value alone; a bare boolean name means True.
    """
    parsed = ConfigDict(defaults)
    for position, word in enumerate(filter(None, (arg or "").split(","))):
        name, given, text = word.partition("=")
        if not given and isinstance(defaults.get(name), bool):
            name, text = name, "true"
        elif not given and position == 0:
            name, text = next(iter(defaults)), word
        if name not in defaults or not (given or text):
            raise ConfigError(f"config argument {word!r}: unknown.{did_you_mean(name, defaults)}")
        parsed[name] = command_line.parse(name, text, defaults[name])
    return parsed


def steps(
    duration: int | str,
    *,
    total: int | None = None,
    steps_per_epoch: int | Fraction | None = None,
    units_per_step: int | Fraction | None = None,
    flops_per_step: int | None = None,
    unit: str = "tokens",
) -> int:
    """A duration in optimizer steps, rounded up: never less than was asked for.

    Args:
      duration: steps as an int, or "1500 steps", "2.5 epochs", "10M tokens", "2T flops", "10%" (of
        `total`).
      total: the length of the run in steps; None where it is itself being computed.
      steps_per_epoch: None where an epoch has no known length (streaming).
      units_per_step: units of the data in one global batch, without padding.
      flops_per_step: of a batch of the full width, in matrix products.
      unit: what the data are counted in.

    Raises ConfigError for what is no duration, and for one in the units of other data.
    """
    try:
        number, duration_unit = rules.duration(duration)
    except ValueError as error:
        raise ConfigError(f"{duration!r} is not {rules.DURATION.words}") from error
    steps_of = {
        "step": 1,
        "epoch": steps_per_epoch,
        unit.removesuffix("s"): units_per_step and Fraction(1, units_per_step),
        "flop": flops_per_step and Fraction(1, flops_per_step),
        "%": total and Fraction(total, 100),
    }
    if duration_unit not in steps_of:
        raise ConfigError(
            f"{duration!r}: the data of config.data are counted in {unit}. Use '3 epochs', "
            f"'50k {unit}' or '1000 steps'"
        )
    per_unit = steps_of[duration_unit]
    if per_unit is None:
        raise ConfigError(f"{duration!r} cannot be turned into steps here: use '1000 steps'")
    return math.ceil(number * per_unit)


@contextlib.contextmanager
def missing_keys(path: str | os.PathLike) -> Iterator[None]:
    """Turns a key that a task looks for in vain into a ConfigError; `path` gave the config."""
    try:
        yield
    except AttributeError as error:
        if not (error.args and isinstance(error.args[0], KeyError)):  # as ConfigDict raises it
            raise
        said = str(error.args[0].args[0]).strip()
        raise ConfigError(
            f"--config={path} lacks a key that its task reads: {said}. The files in configs/ have "
            "every key"
        ) from error


def arms(config: ConfigDict) -> list[ConfigDict]:
    """The configs of the runs that `config.arms` asks for, each without arms; of none, the config.

    Raises ConfigError where one of them is not a config that can be run alone.
    """
    rows = plain(config).get("arms", ())
    if not rows:
        return [config]
    many = range(len(rows[0][1]))
    found = [_arm(config, [(key, values[i]) for key, values in rows]) for i in many]
    digests = [digest(one) for one in found]
    if len(set(digests)) < len(digests):
        raise ConfigError("--config.arms: two arms are the same run, with the same numbers")
    return found


def _arm(config: ConfigDict, values: list[tuple[str, Any]]) -> ConfigDict:
    single = plain(config) | {"arms": ()}
    for key, value in values:
        *sections, name = key.split(".")
        node = single
        for section in sections:
            node = node.get(section) or {}
        # A group can have of its own what it has not said yet.
        if name not in node and not (sections[0] == "group_optim" and node):
            hint = did_you_mean(key, flatten(config))
            raise ConfigError(f"--config.arms: this config has no key {key!r}.{hint}")
        now = node.get(name, 0.0)
        node[name] = float(value) if isinstance(now, float) and isinstance(value, int) else value
    return _checked(ConfigDict(single))


def to_json(config: Mapping | ConfigDict) -> str:
    """The config as indented JSON with sorted keys; tuples become arrays."""
    return json.dumps(plain(config), indent=2, sort_keys=True, allow_nan=False)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`: locked, every array a tuple. Data only, nothing is executed."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ConfigError(f"expected an object, got {type(content).__name__}")
        return ConfigDict(plain(content)).lock()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a JSON config: {error}") from error


def digest(config: ConfigDict) -> str:
    """8 hex digits of what determines a run's numbers: all but `MAY_CHANGE` and secrets."""
    kept = {k: v for k, v in flatten(redact(config)).items() if not may_change(k)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def diff(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for each difference; `ABSENT` where one has no such key."""
    a, b = flatten(a), flatten(b)
    pairs = ((key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in sorted(a.keys() | b.keys()))
    return [(key, left, right) for key, left, right in pairs if left != right]


def redact(config: ConfigDict) -> ConfigDict:
    """A locked copy for saving and logs: text in and under keys named as a secret is "***"."""

    def hide(node, secret=False):
        if isinstance(node, dict):
            return {k: hide(v, secret or bool(SECRET.search(k))) for k, v in node.items()}
        if isinstance(node, tuple):
            return tuple(hide(item, secret) for item in node)
        return "***" if secret and node and isinstance(node, str) else node

    return ConfigDict(hide(plain(config))).lock()


def may_change(key: str) -> bool:
    """True if the dotted `key` may differ between two starts of one run."""
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _read(path: Path, arg: str | None) -> ConfigDict:
    _check_file(path)
    with located(path):
        if path.suffix == ".json":
            return ConfigDict(from_json(path.read_text(encoding="utf-8")))
        config = _call(path, "get_config", arg)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"--config={path}: get_config returned a {kind}, not a ConfigDict")
    return config


def _check_file(path: Path) -> None:
    # os.path: a Path raises for names that are too long.
    if path.suffix not in (".py", ".json") or not os.path.isfile(path):
        hint = files.hint(path)
        raise ConfigError(f"--config: got {quoted(str(path))}, no .py or .json file.{hint}")


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Turns what the user's own code raises into a ConfigError that says where."""
    try:
        yield
    except FmjaxError:
        raise
    except Exception as error:  # any mistake is possible
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: {type(error).__name__}: {error}") from error


def _call(path: Path, name: str, arg: str | None) -> Any:
    """The result of a function of a config file."""
    function = runpy.run_path(str(path)).get(name) if path.suffix == ".py" else None
    if not callable(function):
        raise ConfigError(f"--config={path}: the file defines no {name}(arg=None)")
    if inspect.signature(function).parameters:
        return function(arg)
    if arg is not None:
        raise ConfigError(f"--config={path}:{arg}: its {name}() takes no argument")
    return function()


def _checked(config: ConfigDict) -> ConfigDict:
    config = ConfigDict(plain(config))
    rules.check(config.to_dict())
    constraints.check(config.to_dict())
    if config.get("arms"):
        arms(config)
    return config.lock()
