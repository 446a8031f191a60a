"""Run a task of fmjax on a config:

  python run.py --config=configs/mlm.py                        train; the same command resumes
  python run.py --config=configs/mlm.py:tiny --dry_run         show what would run
  python run.py --config=configs/mlm.py --print_config         every key that can be set
  python run.py --config=configs/mlm.py --config.optim.lr=3e-4 --config.data.train=my.txt
  python run.py --config=configs/….py --sweep                  all trials of a config that has some
  python run.py --config=configs/….py --verify                 does it come to what it is said to?

A config file is executed, with the argument after its colon; a saved config.json is only read.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from fmjax import config as configs
from fmjax import evidence, tasks, trials
from fmjax.errors import ConfigError, FmjaxError, Preempted, did_you_mean


def main(words: list[str]) -> None:
    # No abbreviations: --f must not remove a run.
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", default="", help="FILE.py[:ARG] or config.json")
    parser.add_argument(
        "--workdir", help="default: runs/<config>-<digest>, or where config.json is"
    )
    parser.add_argument("--fresh", action="store_true", help="remove the old run and start over")
    parser.add_argument("--dry_run", action="store_true", help="describe the run, do not start it")
    parser.add_argument(
        "--sweep", nargs="?", const="all", help="all trials of the config, or list, or a number"
    )
    parser.add_argument(
        "--verify", action="store_true", help="run what the config expects, write its evidence"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config")
    flags, overrides = parser.parse_known_args(words)
    if not flags.config:
        raise ConfigError(f"--config is missing.{did_you_mean('', Path('configs').glob('*.py'))}")
    file = Path(flags.config.partition(":")[0])
    if flags.verify:
        if flags.sweep is not None or flags.print_config or flags.dry_run:
            raise ConfigError("--verify runs all that the config expects: leave the other flag out")
        folder = flags.workdir or f"runs/verify-{file.stem}"
        evidence.verify(flags.config, overrides, folder, fresh=flags.fresh)
        return
    if flags.sweep is not None:
        if flags.print_config:
            raise ConfigError(
                "--print_config shows one config: start it with a trial's own command"
            )
        folder, how = flags.workdir or f"runs/{file.stem}", dict(fresh=flags.fresh)
        trials.start(flags.config, overrides, flags.sweep, folder, dry_run=flags.dry_run, **how)
        return
    config = configs.load(flags.config, overrides)
    if flags.print_config:
        print(configs.to_json(configs.redact(config)), flush=True)
        for key, default, value in configs.changes(config, file):
            print(f"changed: {key}: {default!r} -> {value!r}", file=sys.stderr)
        return
    own = file.parent if file.name == "config.json" else None  # the run that it was saved by
    folder = Path(flags.workdir or own or f"runs/{file.stem}-{configs.digest(config)}")
    tasks.start(config, folder, file=file, fresh=flags.fresh, dry_run=flags.dry_run)


def use_huge_pages() -> None:
    """Starts the program again, once, with memory in pages of 2 MiB where Linux has them.

    On a CPU each training step takes its temporary arrays, gigabytes, from the system and gives
    them back; in pages of 4 KiB that was a tenth to a third of the step (benchmarks/RESULTS.md).
    The C library reads this setting only when a program starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    use_huge_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s")  # else a library sets another format
    sys.stdout.reconfigure(errors="backslashreplace")  # for texts that the terminal cannot show
    try:
        main(sys.argv[1:])
    except FmjaxError as error:
        print("" if isinstance(error, Preempted) else "error: ", error, sep="", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # Where nothing catches signals, because nothing could be saved.
        sys.exit(130)
