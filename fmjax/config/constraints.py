"""Constraints between several keys of a config, which no single key shows.

Asked after `fmjax.config.rules`, so each value is of its kind, and before jax is imported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.config import rules
from fmjax.errors import ConfigError, did_you_mean, quoted

# Keys of optim that no group has for itself.
ALL_GROUPS = ("clip", "layer_decay", "ema", "skip_spikes")
# Arguments of optimizers that are made from other keys of optim.
NOT_ARGS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "weight_decay_rate": "weight_decay",
    "mask": "decay",
    "weight_decay_mask": "decay",
}


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for values of the nested dict that contradict each other.

    Raises:
      ConfigError: names the first offending key, the one that it contradicts, and what is possible.
    """
    config = rules.without_none(config)
    if config.get("objectives", True) == {}:
        raise ConfigError(
            "--config.objectives is empty: nothing to train. Set it to a dict such as "
            "{'mlm': {'weight': 1.0}}"
        )
    _check_benchmarks(config.get("benchmarks", ()))
    _check_best(config)
    _check_groups(config)
    _check_optim(config)
    _check_init(config)
    _check_distributed(config.get("distributed", {}))
    if config.get("arms") and config.get("wandb"):
        raise ConfigError(
            "--config.wandb=True with --config.arms: Weights & Biases has one run a process. Set "
            "it to False; each arm has metrics.jsonl and TensorBoard"
        )
    batch_size, accumulate = config.get("batch_size", 1), config.get("accumulate", 1)
    if batch_size % accumulate:
        raise ConfigError(
            f"--config.batch_size={batch_size} is not a multiple of "
            f"--config.accumulate={accumulate}, the number of parts it is cut into"
        )


def _check_benchmarks(asked: Sequence[Mapping[str, Any]]) -> None:
    possible = [name for name in rules.BENCHMARKS if name != "gsm8k"]  # whose answers are written
    for number, given in enumerate(asked):
        key, keys = f"--config.benchmarks[{number}]", ("name", "path", "limit")
        for name in given:
            if name not in keys:
                raise ConfigError(f"{key} has {name!r}.{did_you_mean(name, keys)}")
        if given.get("name") not in possible:
            name = quoted(given.get("name"))
            hint = did_you_mean(str(given.get("name")), possible)
            raise ConfigError(f"{key}.name={name} cannot be asked here.{hint}")
        if [one.get("name") for one in asked].count(given["name"]) > 1:
            raise ConfigError(f"{key}.name={given['name']!r} is there twice: each has one metric")
        if not isinstance(given.get("limit", 0), int) or given.get("limit", 0) < 0:
            limit = quoted(given["limit"])
            raise ConfigError(f"{key}.limit={limit}: give a whole number, 0 for all")
        path = given.get("path", "")
        if not (isinstance(path, str) and os.path.exists(os.path.expanduser(path))):
            raise ConfigError(f"{key}.path={quoted(path)}: no such file or folder")


def _check_best(config: Mapping[str, Any]) -> None:
    best, names = config.get("best", ""), list(config.get("objectives", ()))
    names += [given["name"] for given in config.get("benchmarks", ())]
    metric = rf"validation/(loss|({'|'.join(map(re.escape, names))})/\w+)"
    if best != "" and not (isinstance(best, str) and re.fullmatch(metric, best)):
        possible = ", ".join(f"'validation/{name}/…'" for name in names)
        raise ConfigError(
            f"--config.best: got {quoted(best)}, expected '', 'validation/loss' or a metric of an "
            f"objective: {possible}"
        )


def _check_groups(config: Mapping[str, Any]) -> None:
    possible = ("freeze", "train", *config.get("group_optim", {}))
    for row in config.get("groups", ()):
        if not (isinstance(row, tuple) and len(row) == 2 and rules.is_regex(row[0])):
            words = "(regular expression, group name) pairs"
            raise ConfigError(f"--config.groups: got {quoted(row)}, expected {words}")
        if row[1] not in possible:
            hint = did_you_mean(str(row[1]), possible)
            raise ConfigError(f"--config.groups: no group {quoted(row[1])} in group_optim.{hint}")


def _check_optim(config: Mapping[str, Any]) -> None:
    optim = config.get("optim", {})
    _check_settings("optim", optim, optim)
    trained = {group for _, group in config.get("groups", ())} - {"freeze"}
    possible = [name for name in optim if name not in ALL_GROUPS]
    for group, settings in config.get("group_optim", {}).items():
        key = f"group_optim.{group}"
        if group not in trained:
            raise ConfigError(
                f"--config.{key}: no row of --config.groups trains {group!r}."
                + did_you_mean(group, trained)
            )
        for name in settings:
            if name not in possible:
                raise ConfigError(
                    f"--config.{key}.{name}: no setting that a group can have of its own."
                    + did_you_mean(name, possible)
                )
        _check_settings(key, settings, optim | settings)


def _check_init(config: Mapping[str, Any]) -> None:
    adapter = config.get("adapter", {})
    init = adapter.get("init", "uniform")
    if adapter.get("name") and init not in ("uniform", "normal") and not config.get("init"):
        raise ConfigError(
            f"--config.adapter.init={init!r} starts from the weights of a trained model: name it "
            "with --config.init"
        )
    if config.get("new_head") and not config.get("init"):
        raise ConfigError("--config.new_head=True needs --config.init: without it all is new")
    if "forgetting" in config.get("ledger", ()) and not config.get("init"):
        raise ConfigError(
            "--config.ledger: what begins from nothing has nothing to forget: set --config.init, "
            "or leave forgetting out"
        )


def _check_distributed(distributed: Mapping[str, Any]) -> None:
    count, index = distributed.get("num_processes", 1), distributed.get("process_id", 0)
    coordinator = distributed.get("coordinator", "")
    if distributed.get("auto"):
        if count > 1 or index or coordinator:
            raise ConfigError(
                "--config.distributed.auto=True finds coordinator, num_processes and process_id by "
                "itself: leave them out"
            )
    elif index >= count:
        raise ConfigError(
            f"--config.distributed.process_id={index}: processes are numbered from 0 to "
            f"{count - 1}, as --config.distributed.num_processes={count}"
        )
    elif count > 1 and not coordinator:
        raise ConfigError(
            f"--config.distributed.num_processes={count} needs --config.distributed.coordinator="
            "<host>:<port>: where process 0 is, and a port that is free there"
        )


def _check_settings(key: str, own: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """`own` is what the dict `key` says itself, `settings` with what it inherits."""
    for name in own.get("args", {}):
        if name in NOT_ARGS:
            raise ConfigError(
                f"--config.{key}.args.{name}: set --config.{key}.{NOT_ARGS[name]} instead"
            )
    schedule, cooldown = settings.get("schedule"), settings.get("cooldown", 0)
    cools = rules.duration(cooldown)[0] > 0
    unused = cools and "cooldown" in own and schedule not in ("wsd", "rsqrt")
    if unused or schedule == "wsd" and not cools:
        raise ConfigError(
            f"--config.{key}.cooldown={cooldown!r} does not go with "
            f"--config.{key}.schedule={schedule!r}: wsd needs a cooldown such as '20%', rsqrt can "
            "have one, the others have none"
        )
