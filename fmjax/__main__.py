"""Run a task of fmjax on a config. run.py of a checkout, `python -m fmjax` and `fmjax` are the
same:

  python run.py --config=configs/mlm.py                        train; the same command resumes
  python run.py --config=configs/mlm.py:tiny --dry_run         show what would run
  python run.py --config=configs/mlm.py --print_config         every key that can be set
  python run.py --config=configs/mlm.py --config.optim.lr=3e-4 --config.data.train=my.txt
  python run.py --config=configs/….py --sweep                  all trials of a config that has some
  python run.py --config=configs/….py --verify                 check the documented results
  python run.py --list                                         the configs and what each is for

A config file is executed, with the argument after its colon; a saved config.json is only read.
"""

import argparse
import sys
from pathlib import Path

from fmjax import startup
from fmjax.config import files
from fmjax.errors import ConfigError
from fmjax.io import output


def main(words: list[str]) -> None:
    flags, overrides = parse(words)
    if flags.list:
        print("\n".join(files.listed()), flush=True)
        output.check()
        return
    flags.config = files.shipped(flags.config)
    if not flags.config:
        raise ConfigError(f"--config is missing.{files.usage(overrides)}")
    # Imported when needed: a question that is answered without a library does not wait for it.
    if flags.verify:
        if flags.sweep is not None or flags.print_config or flags.dry_run:
            raise ConfigError("--verify runs all that the config expects: leave the other flag out")
        verify(flags, overrides)
    elif flags.sweep is not None:
        if flags.print_config:
            raise ConfigError(
                "--print_config shows one config: start it with a trial's own command"
            )
        sweep(flags, overrides)
    else:
        run(flags, overrides)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the other words, which are overrides of the config."""
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
    parser.add_argument(
        "--list", action="store_true", help="list the configs, each with its subject"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config")
    return parser.parse_known_args(words)


def verify(flags: argparse.Namespace, overrides: list[str]) -> None:
    from fmjax.experiments import evidence

    folder = flags.workdir or f"runs/verify-{config_file(flags).stem}"
    evidence.verify(flags.config, overrides, folder, fresh=flags.fresh)


def sweep(flags: argparse.Namespace, overrides: list[str]) -> None:
    from fmjax.experiments import trials

    folder = flags.workdir or f"runs/{config_file(flags).stem}"
    which, dry_run = flags.sweep, flags.dry_run
    trials.start(flags.config, overrides, which, folder, fresh=flags.fresh, dry_run=dry_run)
    if which == "list" or dry_run:
        output.check()


def run(flags: argparse.Namespace, overrides: list[str]) -> None:
    from fmjax.config import load as configs

    config, file = configs.load(flags.config, overrides), config_file(flags)
    if flags.print_config:
        print(configs.to_json(configs.redact(config)), flush=True)
        for key, default, value in configs.changes(config, file):
            print(f"changed: {key}: {default!r} -> {value!r}", file=sys.stderr)
        output.check()
        return
    from fmjax import dispatch

    own = file.parent if file.name == "config.json" else None  # the run that it was saved by
    folder = Path(flags.workdir or own or f"runs/{file.stem}-{configs.digest(config)}")
    dispatch.start(config, folder, file=file, fresh=flags.fresh, dry_run=flags.dry_run)


def config_file(flags: argparse.Namespace) -> Path:
    return Path(flags.config.partition(":")[0])


def command() -> None:
    """The program, with the words of its command line."""
    startup.prepare()
    code = 1
    try:
        code = startup.exit_code(main, sys.argv[1:])
    finally:
        startup.bound_end(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
