"""Monitoring of a run: numbers are fetched, averaged, written, shown, and checked.

The loop hands over each step's metrics as device arrays. They are read one step late, when the next
step is already running, so that looking at numbers never makes the device wait.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from fmjax import adapters, build, data
from fmjax import objectives as losses
from fmjax.config import load as configs
from fmjax.distributed import processes
from fmjax.errors import CheckpointError
from fmjax.evaluation import eval_loop
from fmjax.io import atomic, environment, metrics_log, workdir
from fmjax.io.progress import Progress
from fmjax.params import paths
from fmjax.reports import report_facts, run_report
from fmjax.training.setup import shapes


class Monitor:
    """The log of one session of a run; a context manager.

    Runs that are computed together have one each: `arm` says which of the rows of the metrics is
    its own, and they share what `progress` shows.

    first: steps done before this session; saved: the meta of the checkpoint it continues from, {}
    for a new run; units, done_flops: units of data trained on, and their FLOPs, in all sessions;
    last_bad: (step, batch) of the last update that was not finite; bad_in_a_row: how many there
    were with no update applied in between. A spike is no sign of a broken model and does not count.
    """

    def __init__(
        self,
        run: Any,
        folder: Any,
        first: int,
        saved: Mapping,
        started: float,
        restore_sec: float,
        progress: Progress | None = None,
        arm: int | None = None,
    ):
        self._told_best, self._samples = False, list
        config = run.config
        self.run, self.folder, self.first = run, folder, first
        self._arm, self._prefix = arm, "" if arm is None else f"arm {arm}: "
        self.units, self.skipped = saved.get("units", 0), saved.get("skipped", 0)
        self.done_flops = saved.get("flops", 0)
        self.flops: dict[Any, int] = {}  # of a step, by the shapes of its batch
        self.bad_in_a_row, self.last_bad = 0, None
        self._logger = metrics_log.Logger(
            folder.path,
            resume_step=first,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=configs.redact(config).to_dict(),
            process_index=jax.process_index(),
            started=started,
            restore_sec=restore_sec,
        )
        self._progress = progress or show(run, first)
        self._pending: tuple[int, Any, Any] | None = None
        known = processes.first(lambda: _is_evaluated(folder.path, first))
        self._results: tuple[int, dict[str, float]] = (first if known or first == 0 else -1, {})
        self._new_window()
        # The means continue from the last session: being stopped changes no number in the log.
        window = saved.get("window", {"sums": {}, "scalars": {}})
        self._sums |= {name: np.asarray(pair) for name, pair in window["sums"].items()}
        self._scalars |= {name: list(map(float, past)) for name, past in window["scalars"].items()}
        self.timed, self.part = self._logger.timed, self._progress.part
        self.doing = self._progress.doing
        if first and not arm:
            self._progress.print(f"resuming at step {first} of {run.total} (verified checkpoint)")

    def step(self, step: int, found: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> int:
        """Takes the metrics of the step just dispatched, reads those of the step before.

        Returns how many updates in a row were not finite, up to the one read.
        """
        self._read()
        self._pending = (step, found, batch)
        self._progress.step(step)
        return self.bad_in_a_row

    def log(self, step: int) -> None:
        """Means over the steps since the last log."""
        self._read()
        seconds = time.monotonic() - self._since
        spent = {kind: now - self._spent[kind] for kind, now in self._logger.spent.items()}
        stepping = max(seconds - sum(spent.values()) + spent["data_wait"], 1e-9)
        train = losses.mean(self._sums, self.run.objectives)
        metrics = {f"train/{name}": value for name, value in train.items()}
        for name, values in self._scalars.items():
            metrics[f"optim/{name}"] = np.mean(values) if values else float("nan")
        for group, rate in self.run.optimizer.rates.items():
            name = "optim/lr" if len(self.run.optimizer.rates) == 1 else f"optim/lr/{group}"
            # The optimizer's count, which a skipped update does not advance.
            metrics[name] = float(rate(step - 1 - self.skipped))
        metrics |= {
            f"perf/{self.run.dataset.unit}_per_sec": self._units / stepping,
            "perf/step_sec": stepping / max(self._steps, 1),
            "perf/data_wait": spent["data_wait"] / stepping,
            "memory/peak_gib": _peak_bytes() / 2**30,
            self.run.dataset.unit: self.units,
            "flops": self.done_flops,
        }
        peak = build.peak_flops(jax.devices()[0])
        if peak:
            metrics["perf/mfu"] = self._flops / stepping / (peak * jax.device_count())
        self._logger.write(step, metrics)
        if not self._arm:
            self._progress.log(step, metrics, self._arm)
        self.folder.update(step=step)
        self._new_window()

    def evaluated(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        examples: Mapping[str, np.ndarray] = MappingProxyType({}),
        samples: Callable[[], list[dict[str, str]]] = list,
    ) -> None:
        """Takes the validation metrics: None when a signal cut it short, {} when there are none;
        what each example adds to them goes to examples.npz, of the last evaluation alone. `samples`
        gives what the report shows of it."""
        if metrics is None:
            return
        self._samples = samples
        if examples and jax.process_index() == 0:
            self._keep({"step": np.asarray(step), **examples})
        metrics = {**metrics, **eval_loop.perplexity(metrics)}
        named = {f"validation/{name}": value for name, value in metrics.items()}
        self._results = (step, named)
        if named:
            self._logger.write(step, named)
            if self._arm is None:
                self._progress.log(step, named)
            else:
                shown = dict.fromkeys(("validation/loss", self.run.config.best))
                told = ", ".join(f"{name} {named[name]:.4f}" for name in shown if name in named)
                self._progress.print(f"step {step}, arm {self._arm}: {told}")
            self._tell_best(step, named)

    def _keep(self, arrays: Mapping[str, np.ndarray]) -> None:
        """A full disk is not worth a training run; old numbers beside new ones would be wrong."""
        file = self.folder.path / workdir.EXAMPLES
        try:
            atomic.write_arrays(file, arrays)
        except CheckpointError as error:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            self._progress.print(f"{self._prefix}left out: {error}")

    def _keep_samples(self) -> None:
        """What the report shows of the last evaluation; nothing of it is worth a run that is
        done."""
        try:
            samples = self._samples()
        except Exception as error:  # a tokenizer of others may fail at anything
            self._progress.print(f"{self._prefix}left out of the report: examples ({error!r})")
            return
        if samples:
            file = self.folder.path / workdir.PREDICTIONS
            atomic.write_atomic(file, json.dumps(samples, indent=2, ensure_ascii=False))

    def owes_evaluation(self, step: int) -> bool:
        """True if a signal has cut the evaluation of `step` short, in this session or the last."""
        return self._results[0] != step

    def save(self, saver: Any, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts a checkpoint, with the validation metrics if they are of this very step."""
        if self.folder.lock:
            self.folder.lock.hold()
        measured, metrics = self._results
        if saver.save(step, state, meta, metrics if measured == step else None):
            self._logger.event("checkpoint", step=step)
        if saver.committed is not None:
            self._progress.saved(saver.committed)
            self.folder.update(checkpoint=saver.committed)

    def saved(self) -> dict[str, Any]:
        """The monitor's part of a checkpoint (JSON): the units so far, and the means being
        taken."""
        self._read()
        sums = {name: pair.tolist() for name, pair in self._sums.items()}
        window = metrics_log.plain({"sums": sums, "scalars": self._scalars})
        failure = str(self.folder.failure or "")
        counted = {
            "failure": failure,
            "units": self.units,
            "skipped": self.skipped,
            "flops": self.done_flops,
        }
        return counted | {"window": window}

    def fail(self, step: int, error: Exception) -> None:
        """Takes note that this run has come to nothing, while those beside it continue."""
        self.folder.failure = error
        self._logger.event("failed", step=step, reason=str(error))
        self._progress.print(f"{self._prefix}{error}")

    def end(self, step: int, signal: str) -> None:
        """The last line; `signal` is what ended the run early."""
        self._read()
        how = "failed" if self.folder.failure else "preempted" if signal else "done"
        self._logger.event(how, step=step, signal=signal)
        reason = str(self.folder.failure or "")
        self.folder.update(step=step, state=how, checkpoint=step, reason=reason)

    def finish(self, signal: str, changed: Sequence[tuple[str, Any, Any]]) -> None:
        """Write summary.json and report.html; `changed` is what differs from the config file.

        Raises CheckpointError where they cannot be written, but not after a signal: what counts
        then is that the state is saved.
        """
        if jax.process_index() != 0:
            return
        try:
            self._report(signal, changed)
        except (OSError, CheckpointError) as error:
            lost = f"the report is not written: {error}"
            if not signal:
                raise CheckpointError(
                    f"{lost}. The run is done and saved, and the same command writes it"
                ) from error
            self._progress.print(lost)

    def _report(self, signal: str, changed: Sequence[tuple[str, Any, Any]]) -> None:
        device, moving = jax.devices()[0], self.run.split(self.run.abstract.params)[0]
        summary = run_report.summarize(
            self.folder.path,
            total=self.run.total,
            parameters=adapters.parameters(self.run.model, self.run.abstract.params),
            trainable_parameters=paths.size(moving),
            model=_described(self.run.model),
            finished=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            kept_bytes=paths.nbytes(moving),
            config_difference=changed,
            environment=environment.environment(
                device=f"{jax.device_count()} x {device.device_kind}"
            ),
            data=self.run.dataset.counts,
            data_digest=self.run.dataset.digest,
            rows_digest=self.run.dataset.rows_digest,
        )
        self._progress.close()
        self._keep_samples()
        page = run_report.write(self.folder.path)
        if self._arm is not None:
            return
        goals = self.run.objectives
        scores = [f"{goal.name}/{score}" for goal in goals for score in ("accuracy", *goal.scores)]
        scores += [f"{one['name']}/accuracy" for one in self.run.config.get("benchmarks", ())]
        for name in ("loss", *scores):
            value = summary["metrics"].get(f"validation/{name}")
            if value is not None and not signal:
                print(f"validation/{name} {value:.4f}")
        print(f"report: {page}")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.close()
        self._logger.close()

    def _new_window(self) -> None:
        self._since, self._spent = time.monotonic(), dict(self._logger.spent)
        self._sums: dict[str, np.ndarray] = {}
        self._scalars: dict[str, list[float]] = {"grad_norm": [], "skipped": []}
        if self.run.config.optim.skip_spikes:
            self._scalars["spike"] = []
        self._steps = self._units = self._flops = 0

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, found, batch), self._pending = self._pending, None
        found = jax.device_get(found)  # fetched once, whoever asks again
        if self._arm is not None:
            found = jax.tree.map(lambda x: x[self._arm], found)
        units, flops = int(found["units"]), self.flops[shapes(batch)]
        self._flops, self.done_flops = self._flops + flops, self.done_flops + flops
        self._units, self.units = self._units + units, self.units + units
        self._steps += 1
        for name in self._scalars.keys() - {"grad_norm"}:
            self._scalars[name].append(float(found[name]))
        bad, spike = bool(found["skipped"]), bool(found["spike"])
        if bad or spike:
            self._tell_skipped(step, found, bad)
        if bad:
            # Its numbers are not finite and would hide the rest of the window; the count tells.
            self.bad_in_a_row, self.last_bad = self.bad_in_a_row + 1, (step, batch)
            return
        if not spike:
            self.bad_in_a_row = 0
        self._scalars["grad_norm"].append(float(found["grad_norm"]))
        eval_loop.add(self._sums, found["sums"])

    def _tell_best(self, step: int, metrics: Mapping[str, float]) -> None:
        config = self.run.config
        if config.keep_best and not (self._told_best or np.isfinite(metrics.get(config.best, 0.0))):
            self._told_best = True
            self._progress.print(
                f"{self._prefix}step {step}: {config.best} is {metrics[config.best]}, so "
                "that no such checkpoint becomes the best one; config.best may change, and the run "
                "go on"
            )

    def _tell_skipped(self, step: int, found: Mapping[str, Any], bad: bool) -> None:
        self.skipped += 1
        if self.folder.failure:
            return
        config = self.run.config
        facts = {
            "step": step,
            "examples": data.examples(
                step - 1, batch_size=config.batch_size, skip=config.data.skip
            ),
            "loss": float(found["loss"]),
            "grad_norm": float(found["grad_norm"]),
        }
        self._logger.event("skipped_update" if bad else "skipped_spike", **facts)
        self._progress.print(
            f"{self._prefix}step {step}: update skipped{'' if bad else ' as a spike'}, "
            f"loss {facts['loss']}, gradient norm {facts['grad_norm']}"
        )


def show(run: Any, first: int) -> Progress:
    """The progress display of a run that resumes after `first` steps."""
    main = jax.process_index() == 0
    return Progress(run.total, start=first, best=run.config.best, enabled=main)


@contextlib.contextmanager
def timed(monitors: Iterable[Monitor], kind: str) -> Iterator[None]:
    """Charge the time of the block to every monitor."""
    with contextlib.ExitStack() as stack:
        for monitor in monitors:
            stack.enter_context(monitor.timed(kind))
        yield


def _is_evaluated(folder: Path, step: int) -> bool:
    rows, _ = metrics_log.read(folder)
    return any(row["step"] == step and "validation/loss" in row for row in rows)


def _described(model: Any) -> dict[str, Any]:
    """The name of a model's family and its sizes."""
    cfg, name = model.cfg, type(adapters.base(model)).__module__.rpartition(".")[2]
    sizes = {key: getattr(cfg, key) for key in report_facts.SIZES if hasattr(cfg, key)}
    return {"name": name, **sizes}


def _peak_bytes() -> int:
    """Most memory used so far: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
