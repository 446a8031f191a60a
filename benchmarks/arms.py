"""N runs as arms of one program, and the same N runs one after another: whole commands.

    python benchmarks/arms.py --model=<HF folder> --train=SST-2/train.tsv --validation=SST-2/dev.tsv

LoRA with N learning rates. Both ways are `python run.py` as a user types it, by turns, and start
from prepared data and compiled programs: a run that nobody times has made them. Printed are seconds
of all N, their ratio (one after another / together) in each round, and seconds of a step of all N,
as the runs log it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="folder in Hugging Face format")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--config", default="configs/finetune_lora.py")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--arms", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--examples", type=int, default=1600)
    parser.add_argument("--runs", type=int, default=3)
    flags = parser.parse_args()
    rates = tuple(round(1e-4 * 1.5**i, 7) for i in range(flags.arms))
    apart = [[f"--config.optim.lr={rate}"] for rate in rates]
    together = [[f"--config.arms=(('optim.lr',{rates}),)".replace(" ", "")]]
    for words in (apart[:1], together):
        timed(words, flags)
    found = []
    for _ in range(flags.runs):
        found.append((timed(apart, flags), timed(together, flags)))
        (one, step), (all_, steps) = found[-1]
        print(
            f"{one:7.1f} s apart, {all_:6.1f} s together: {one / all_:.2f} x; a step of all "
            f"{step:.3f} s apart, {steps:.3f} s together: {step / steps:.2f} x",
            flush=True,
        )
    for name, part in (("commands", 0), ("steps", 1)):
        ratios = [one[part] / other[part] for one, other in found]
        spread = f"({min(ratios):.2f} … {max(ratios):.2f})"
        print(f"{name}: {statistics.median(ratios):.2f} {spread} x as fast together")


def timed(words: list[list[str]], flags: argparse.Namespace) -> tuple[float, float]:
    """(seconds of the commands, seconds of a step of each added up)."""
    seconds = step = 0.0
    for own in words:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "run.py", f"--config={flags.config}", f"--workdir={folder}/run"),
                f"--config.init={os.path.abspath(flags.model)}",
                f"--config.data.train={os.path.abspath(flags.train)}",
                f"--config.data.validation={os.path.abspath(flags.validation)}",
                *("--config.data.columns=sentence", f"--config.data.seq_len={flags.seq}"),
                f"--config.data.max_documents={flags.examples}",
                *(f"--config.total={flags.steps}", f"--config.batch_size={flags.batch}"),
                *(f"--config.log_every={flags.steps // 2}", "--config.eval_every=0"),
                *("--config.save_every=0", *(f"--config.{word}" for word in flags.set), *own),
            ]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds += time.perf_counter() - start
            # The first log has the compilation in it.
            log = next(Path(folder).rglob("metrics.jsonl")).read_text().splitlines()
            step += [row for row in map(json.loads, log) if "perf/step_sec" in row][-1][
                "perf/step_sec"
            ]
    return seconds, step


if __name__ == "__main__":
    main()
