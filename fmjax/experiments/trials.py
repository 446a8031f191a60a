"""The trials of a sweep: runs of their own, each with a folder and a record of what came of it.

    python run.py --config=configs/….py --sweep          all that have no record yet, one by one
    python run.py --config=configs/….py --sweep=list     what they set, and how far they are
    python run.py --config=configs/….py --sweep=7        that one, again if it has failed

    <workdir>/<trial>/         what its task writes there
    <workdir>/<trial>.json     what it sets, its command, and of each of its arms the metrics
    <workdir>/report.html      all of it to read: `fmjax.experiments.sweep_report`; sweep.json has
    the trials

A trial is called by its task and the digest of its config: what is changed in the file or on the
command line makes other trials, and those of before stay as they are. One that fails does not stop
the rest; one that diverged is not tried again, since that is a result. Several commands, on one
machine or on several that share the folder, share the trials among themselves. Nothing here imports
jax.
"""

import contextlib
import inspect
import itertools
import json
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fmjax import dispatch
from fmjax.config import load as configs
from fmjax.errors import (
    ConfigError,
    FmjaxError,
    NumericsError,
    Preempted,
    of_exit_code,
)
from fmjax.experiments import sweep_results, trial_records
from fmjax.experiments.trial_records import Record
from fmjax.io import lock
from fmjax.io.metrics_log import command
from fmjax.io.storage import writing


class Trial(NamedTuple):
    """One run of a sweep."""

    number: int  # from 1, in the order of the sweep
    settings: dict[str, Any]  # what the sweep sets
    words: list[str]  # of its own command, after run.py
    config: ConfigDict

    @property
    def name(self) -> str:
        return f"{self.config.task}-{configs.digest(self.config)}"


def start(
    spec: str,
    overrides: Sequence[str],
    which: str,
    folder: str | os.PathLike,
    *,
    fresh: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs the trials of the sweep in the config file `spec`, or lists them.

    Args:
      overrides: words of the command line, for every trial.
      which: "all", "list", or the number of a trial.
      fresh: does again what has a record.

    Raises:
      ConfigError: there is no sweep, no trial of that number, or a config that is refused; before
        any is run. What a trial has failed with, when all have been tried.
    """
    folder, wanted = Path(folder), _number(which)
    looks = dry_run or which == "list"
    if looks and fresh:
        raise ConfigError("--fresh means nothing to --sweep=list and --dry_run")
    asked = None if looks else str(wanted or "all")
    told = run(walk(spec, overrides, folder), spec, folder, asked, fresh=fresh)
    if (wanted or 0) > (number := max(trial.number for trial, _ in told)):
        raise ConfigError(f"--sweep={which}: the sweep has the trials 1 to {number} so far")
    sweep_results.show(told, folder)
    if not looks:
        sweep_results.keep(told, spec, overrides, folder)
    failed = [pair for pair in told if pair[1] and pair[1]["state"] == "failed"]
    if wanted:
        failed = [pair for pair in failed if pair[0].number == wanted]
    if failed and not looks:
        trial, record = failed[0]
        more = f"{len(failed)} of {len(told)} trials failed; " if len(failed) > 1 else ""
        raise of_exit_code(record["exit_code"])(f"{more}trial {trial.number}: {record['reason']}")


def run(
    found: Iterable[Trial], spec: str, folder: Path, which: str | None, *, fresh: bool = False
) -> list[tuple[Trial, Record | None]]:
    """The trials with their records, after those that `which` asks for have been run."""
    told: dict[str, tuple[Trial, Record | None]] = {}
    for trial in found:
        # A sweep that learns may ask for one twice.
        if which in ("all", str(trial.number)) and trial.name not in told:
            _take(trial, spec, folder, fresh=fresh, again=which != "all")
        told[trial.name] = trial, read(folder, trial)
    if not told:
        raise ConfigError(f"--config={spec}: get_sweep gave no trial")
    return list(told.values())


def walk(
    spec: str,
    overrides: Sequence[str],
    folder: Path,
    sweep: Sequence[Mapping[str, Any]] | Generator | None = None,
) -> Iterator[Trial]:
    """The trials of the config's sweep, or of `sweep`, in order. One that is a generator is sent
    the record of each before it says the next, and ends for now where there is none."""
    path = spec.partition(":")[0]
    sweep = configs.sweep(spec) if sweep is None else sweep
    if not inspect.isgenerator(sweep):
        yield from _different([_trial(spec, overrides, n, own) for n, own in enumerate(sweep, 1)])
        return
    record = None
    for number in itertools.count(1):
        with configs.located(Path(path)):
            try:
                own = sweep.send(record)
            except StopIteration:
                return
        trial = _trial(spec, overrides, number, configs.settings(path, own))
        yield trial
        record = read(folder, trial)
        if record is None:
            return


def read(folder: Path, trial: Trial) -> Record | None:
    """The record of a trial, None where it has not ended; as the sweep has it now, which may have
    numbered it otherwise when it ran."""
    record = trial_records.read(folder / f"{trial.name}.json")
    return record and record | {"number": trial.number, "settings": trial.settings}


def _trial(spec: str, overrides: Sequence[str], number: int, settings: Mapping[str, Any]) -> Trial:
    path, _, arg = spec.partition(":")
    arg = settings.get("arg", arg)
    text = lambda value: value if isinstance(value, str) else repr(value)
    words = {key: value for key, value in settings.items() if key not in ("arg", "group")}
    own = [f"--config.{key}={text(value)}" for key, value in words.items()]
    given = {word.partition("=")[0] for word in overrides}
    if twice := [word for word in own if word.partition("=")[0] in given]:
        raise ConfigError(f"{twice[0].partition('=')[0]} is what the trials of the sweep differ in")
    named = f"{path}:{arg}" if arg else path
    try:
        config = configs.load(named, [*overrides, *own])
    except ConfigError as error:
        raise ConfigError(f"trial {number} ({_told(settings)}): {error}") from error
    if config.get("distributed") and (
        config.distributed.auto or config.distributed.num_processes > 1
    ):
        raise ConfigError(
            "config.distributed: a sweep runs each trial in one process. For one on several, start "
            f"it by itself: python run.py {shlex.join([f'--config={named}', *own])} …"
        )
    if both := settings.keys() & dict(config.get("arms", ())).keys():
        raise ConfigError(
            f"trial {number} ({_told(settings)}): {sorted(both)[0]!r} is what config.arms "
            "varies within each trial: leave it out of one of them"
        )
    return Trial(number, dict(settings), [f"--config={named}", *overrides, *own], config)


def _different(trials: list[Trial]) -> list[Trial]:
    numbers: dict[str, int] = {}
    for trial in trials:
        if trial.name in numbers:
            raise ConfigError(
                f"get_sweep: the trials {numbers[trial.name]} and {trial.number} "
                f"({_told(trial.settings)}) are the same run: what they differ in, if anything, "
                "does not change its numbers"
            )
        numbers[trial.name] = trial.number
    _check_groups(trials)
    return trials


def _check_groups(trials: Sequence[Trial]) -> None:
    """Raise ConfigError for a group in which two results would have the same seed."""
    first: dict[tuple, int] = {}
    for trial in trials:
        for single in configs.arms(trial.config) if "group" in trial.settings else ():
            own = trial.settings["group"], single.get("best"), single.get("seed")
            if own in first:
                raise ConfigError(
                    f"get_sweep: the trials {first[own]} and {trial.number} have the same group "
                    f"{own[0]!r} and the same seed {own[2]}: what differs in more than the seed "
                    "needs another group"
                )
            first[own] = trial.number


def _take(trial: Trial, spec: str, folder: Path, *, fresh: bool, again: bool) -> None:
    """Runs a trial that is not done, unless it is being run elsewhere, and writes its record."""
    file, where = folder / f"{trial.name}.json", folder / trial.name
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.locked(folder / "locks", print, f"{trial.name}.json"))
        except lock.InUse as error:
            print(f"\ntrial {trial.number} is being run already: {error}", flush=True)
            return
        before = read(folder, trial)
        if before and not fresh:
            diverged = before["exit_code"] == NumericsError.exit_code
            if before["state"] == "done" and _asked(before["config"]) == _asked(trial.config):
                return
            if diverged and not again:
                return
        if fresh and where.exists():
            try:
                with lock.locked(where, print), writing(where):
                    shutil.rmtree(where)
            except lock.InUse as error:
                print(f"\ntrial {trial.number} is being run already: {error}", flush=True)
                return
        with writing(file):
            file.unlink(missing_ok=True)
        print(f"\ntrial {trial.number}: {_told(trial.settings)}", flush=True)
        record = {
            "number": trial.number,
            "settings": trial.settings,
            "command": command(["run.py", *trial.words, f"--workdir={where}"]),
            "folder": str(where),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "state": "done",
            "reason": "",
            "exit_code": 0,
        }
        started = time.monotonic()
        try:
            with _as_command(["run.py", *trial.words, f"--workdir={where}"]):
                dispatch.start(trial.config, where, file=spec.partition(":")[0])
        except Preempted:
            raise
        except lock.InUse as error:  # by a command of its own
            print(f"trial {trial.number} is being run already: {error}", flush=True)
            return
        except Exception as error:  # A bug too is no reason not to try the others.
            if not isinstance(error, FmjaxError):
                traceback.print_exc()
            print(f"trial {trial.number} failed: {error}", file=sys.stderr, flush=True)
            reason = (
                str(error) if isinstance(error, FmjaxError) else f"{type(error).__name__}: {error}"
            )
            code = getattr(error, "exit_code", FmjaxError.exit_code)
            record |= {"state": "failed", "reason": reason[:2000], "exit_code": code}
        results = sweep_results.found(where, trial.config)
        here = time.monotonic() - started  # what all sessions took is known by what they wrote
        seconds = max([here, *(float(one["seconds"]) for one in results if "seconds" in one)])
        record |= {"seconds": seconds, "results": results}
        if record["state"] == "done" and not record["results"]:
            reason = (
                f"the task {trial.config.task!r} leaves no summary.json, so that nothing is known"
            )
            record |= {"state": "failed", "reason": reason, "exit_code": ConfigError.exit_code}
        record["config"] = json.loads(configs.to_json(configs.redact(trial.config)))
        trial_records.write(file, record)


@contextlib.contextmanager
def _as_command(words: list[str]) -> Iterator[None]:
    """Record these words as the command that resumes what runs inside."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _asked(config: Mapping[str, Any] | ConfigDict) -> str:
    """The requested measurements of a finished run, which can be made up for."""
    return json.dumps(configs.plain([config.get(k) for k in ("ledger", "pretraining", "samples")]))


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "the config as it is"


def _number(which: str) -> int | None:
    if which in ("all", "list"):
        return None
    if which.isdecimal() and int(which) > 0:
        return int(which)
    raise ConfigError(f"--sweep={which}: give nothing, list, or the number of a trial")
