"""From the command to the end of the first step: seconds, compilation, peak memory, beside torch.

    python benchmarks/startup.py

Needs torch (`pip install torch`). Ours is `python run.py --config=configs/mlm.py` as a user types
it, cold (nothing prepared, nothing compiled) and warm (data and compiled programs in the cache).
The peer is a script that loads the exported model and makes one update on random rows with
transformers + torch, eager and compiled: it prepares no data and writes no run folder.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    *("--config.total=2 steps", "--config.log_every=1"),
    *("--config.eval_every=0", "--config.save_every=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)  # FOLDER:HOW, for ourselves
    flags = parser.parse_args()
    if flags.peer:
        return peer(*flags.peer.rsplit(":", 1))
    found: dict[str, list[dict]] = {"cold": [], "warm": [], "torch": [], "torch compiled": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(flags.runs):
            cache = Path(folder, f"cache-{i}")
            found["cold"].append(ours(Path(folder, f"cold-{i}"), cache))
            found["warm"].append(ours(Path(folder, f"warm-{i}"), cache))
            exported = Path(folder, "exported")
            if i == 0:
                export(Path(folder, "warm-0"), exported, cache)
            for how in ("torch", "torch compiled"):
                found[how].append(theirs(exported, how))
    print(f"\n{'':15} {'first step s':>24} {'compile s':>10} {'peak GiB':>9}")
    for name, runs in found.items():
        first, compiling, peak = (
            [run[key] for run in runs] for key in ("first_step", "compile", "peak_gib")
        )
        print(
            f"{name:15} {statistics.median(first):7.1f} ({min(first):5.1f} … {max(first):5.1f}) "
            f"{statistics.median(compiling):10.1f} {max(peak):9.2f}"
        )


def ours(workdir: Path, cache: Path) -> dict[str, float]:
    start = time.time()
    first = None
    for line in run("configs/mlm.py", cache, f"--workdir={workdir}", *SHORT):
        if first is None and line.startswith("step "):  # printed when its loss has been read
            first = time.time() - start
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "train/loss" in line)
    return {
        "first_step": first,
        "compile": logged["spent"]["compile"],
        "peak_gib": logged["memory/peak_gib"],
    }


def export(run_folder: Path, output: Path, cache: Path) -> None:
    flags = f"--config.folder={run_folder}", f"--config.output={output}"
    list(run("configs/export.py", cache, *flags))


def run(config: str, cache: Path, *flags: str) -> Iterator[str]:
    """The lines that a task prints, as they come."""
    environment = {**os.environ, "FMJAX_CACHE": str(cache)}
    command = [sys.executable, "run.py", f"--config={config}", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def theirs(folder: Path, how: str) -> dict[str, float]:
    command = [sys.executable, __file__, f"--peer={folder}:{how}"]
    start = time.time()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "first_step": found["end"] - start}


def peer(folder: str, how: str) -> None:
    """One update of the exported model on random rows of the default run's shape."""
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    ids = torch.randint(5, model.config.vocab_size, (16, 128))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    begin = time.time()
    run = torch.compile(model) if how == "torch compiled" else model
    run(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    end = time.time()
    compiling = end - begin if how == "torch compiled" else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"end": end, "compile": compiling, "peak_gib": peak}))


if __name__ == "__main__":
    main()
