"""configs/shakespeare.py against nanoGPT's own script: whole commands, from nothing prepared.

    python benchmarks/shakespeare.py --input=input.txt --nanogpt=<its folder>

Needs torch (`pip install torch`) and nanoGPT's repository, of which nothing is changed: its script
runs in a copy, as its README says for a CPU. Sides take turns; the ratio is theirs / ours for
neighbours, so above 1 we are faster. Three sides:

    nanogpt  its training command; its prepare.py has run before the clock starts
    cold     ours with an empty cache: tokens are made and programs are compiled
    warm     ours again, in another run folder

Both evaluate and save as their configs say: nanoGPT 9 times on 480 rows drawn from both splits,
ours 4 times on the 1,743 of validation, and it writes a report. The losses are not of the same
rows, and the rates of learning differ: see configs/shakespeare.py. `--compile` is nanoGPT's.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
HOW = dict(max_iters=2000, lr_decay_iters=2000, eval_iters=20, log_interval=50, device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="the text, 1,115,394 letters")
    parser.add_argument("--nanogpt", required=True, help="folder of its train.py")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="nanoGPT with torch.compile")
    flags = parser.parse_args()
    seconds = {"nanogpt": [], "cold": [], "warm": []}
    losses = {name: [] for name in seconds}
    for run in range(flags.runs):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            text = Path(flags.input).read_text()
            cut = int(len(text) * 0.9)
            (home / "train.txt").write_text(text[:cut])
            (home / "validation.txt").write_text(text[cut:])
            commands = {"nanogpt": nanogpt(home, flags)}
            commands |= {name: ours(home, name, run) for name in ("cold", "warm")}
            for name, (words, place) in commands.items():
                start = time.perf_counter()
                env = dict(os.environ, FMJAX_CACHE=str(home / "cache"), PYTHONPATH=str(ROOT))
                env |= dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py sets it itself
                done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True)
                seconds[name].append(time.perf_counter() - start)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
                losses[name].append(loss(name, home, done.stdout))
                print(f"{run} {name} {seconds[name][-1]:.1f} s {losses[name][-1]:.4f}", flush=True)
    print(f"{'':8} {'median s':>9} {'min':>7} {'max':>7}  nanogpt / this        validation")
    for name, found in seconds.items():
        each = [a / b for a, b in zip(seconds["nanogpt"], found, strict=True)]
        ratio = f"{statistics.median(each):.2f} ({min(each):.2f} … {max(each):.2f})"
        told = " ".join(f"{x:.4f}" for x in losses[name])
        print(
            f"{name:8} {statistics.median(found):9.1f} {min(found):7.1f} {max(found):7.1f}  "
            f"{ratio:20}  {told}"
        )


def nanogpt(home: Path, flags: argparse.Namespace) -> tuple[list[str], Path]:
    """(command, where it runs): a copy of the repository with the tokens its prepare.py writes."""
    place = home / "nanogpt"
    shutil.copytree(flags.nanogpt, place, ignore=shutil.ignore_patterns(".git", "out*"))
    data = place / "data" / "shakespeare_char"
    shutil.copy(flags.input, data / "input.txt")
    (data / "requests.py").write_text("")  # which it imports to fetch the text
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    keys = {**SIZES, **HOW, "compile": flags.compile}
    words = [f"--{key}={value}" for key, value in keys.items()]
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *words], place


def ours(home: Path, name: str, seed: int) -> tuple[list[str], Path]:
    words = [f"--config.data.{part}={home / part}.txt" for part in ("train", "validation")]
    words += [f"--workdir={home / name}", f"--config.seed={seed}"]
    return [sys.executable, "run.py", "--config=configs/shakespeare.py", *words], ROOT


def loss(name: str, home: Path, printed: str) -> float:
    """The last one of validation."""
    if name == "nanogpt":
        return float(re.findall(r"val loss ([\d.]+)", printed)[-1])
    return json.loads((home / name / "summary.json").read_text())["metrics"]["validation/loss"]


if __name__ == "__main__":
    main()
