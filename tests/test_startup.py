"""The start of the program: streams that fail, signals while it imports, what it imports at all."""

import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from common import ROOT

from fmjax import startup
from fmjax.config import files
from fmjax.config import load as configs
from fmjax.distributed import signals
from fmjax.errors import CheckpointError, ConfigError, did_you_mean
from fmjax.io import output

RUN = [sys.executable, str(ROOT / "run.py")]


def shell(command, **environment):
    """A command with {run} in it, in the project's folder."""
    return subprocess.run(
        ["bash", "-c", command.format(run=" ".join(RUN))],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def full_disk():
    """Standard output on a device that has no room, and standard error."""
    file = os.open("/dev/full", os.O_WRONLY)
    yield output.DroppingFile(file)
    os.close(file)


def test_what_cannot_be_printed_is_dropped_and_said_once(full_disk, monkeypatch, capfd):
    monkeypatch.setattr(output, "_warn", lambda descriptor, error: print(error.strerror))
    stream = io.TextIOWrapper(io.BufferedWriter(full_disk), line_buffering=True)
    for _ in range(3):
        print("a line", file=stream)
    assert capfd.readouterr().out == "No space left on device\n"
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(CheckpointError, match="standard output cannot be written: No space"):
        output.check()


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(output, "_warn", lambda descriptor, error: None)
    file = output.DroppingFile(writer)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    print("a line", flush=True)
    assert isinstance(file.error, BrokenPipeError)
    output.check()
    os.close(writer)


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("{run} --help >&-", 0, ""),
        ("{run} --help >&- 2>&- <&-", 0, ""),
        ("{run} --config=configs/mlm.py --print_config 2>&-", 0, ""),
        ("{run} --config=configs/mlm.py --print_config >/dev/full", 4, "No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(command, code, said):
    done = shell(command)
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2


WAITING = """
import sys, time
from fmjax import startup
startup.prepare()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)],
)
def test_a_signal_while_it_starts_ends_it_in_silence(number, code):
    command = [sys.executable, "-c", WAITING]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == code


def test_a_signal_before_the_program_is_started_again_is_not_lost():
    """It waits, blocked, for the handlers of the second start."""
    program = (
        "import os, signal, sys; from fmjax.distributed import signals; from fmjax import startup\n"
        "if 'GLIBC_TUNABLES' not in os.environ:\n"
        "    exec_ = os.execv\n"
        "    os.execv = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), exec_(*a))\n"
        "startup.prepare(); print('not ended')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_a_program_that_cannot_be_started_again_goes_on(monkeypatch):
    """Signals are heard again, as before."""

    def refused(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", refused)
    startup.use_huge_pages()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.SIGNALS)


def test_sighup_stays_ignored_under_nohup():
    program = "import signal; from fmjax.distributed import signals; signals.end_at_once(); "
    program += "print(signal.getsignal(signal.SIGHUP).name)"
    done = shell(f"trap '' HUP; {sys.executable} -c '{program}'", PYTHONPATH=str(ROOT))
    assert done.stdout == "SIG_IGN\n", done.stderr


@pytest.mark.parametrize(
    "words, code, absent",
    [
        (["--help"], 0, "numpy ml_collections scipy jax"),
        (["--config=configs/mlm.py", "--print_config"], 0, "scipy jax"),
        (["--config=configs/mlm.py", "--config.sed=1"], 2, "scipy jax numpy"),
        (["--config=configs/absent.py"], 2, "scipy jax numpy"),
    ],
)
def test_an_answer_does_not_wait_for_libraries_that_it_does_not_need(words, code, absent):
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        f"print(code, *[name for name in {absent.split()!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, *words]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(code), done.stderr


def test_a_config_without_its_flag_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "mine.py"
    file.write_text('"""Mine, of today:\n\nmore"""\n')
    usage = files.usage(["configs/mine.py:tiny", "--fresh"])
    assert usage == " Did you mean: python run.py --config=configs/mine.py:tiny"
    assert files.usage([]).splitlines()[1] == "  --config=configs/mine.py  Mine, of today"
    file.unlink()  # Where there are none, those that are shipped.
    lines = files.usage([]).splitlines()
    assert any(line.startswith("  --config=configs/mlm.py ") for line in lines)
    for name in ("ablations/depth.py", "vision/vit.py"):
        assert any(line.startswith(f"  --config=configs/{name} ") for line in lines)


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.shipped("configs/mlm.py:tiny") == f"{ROOT}/configs/mlm.py:tiny"
    for spec in ("", "configs/none.py", "mlm.py", "configs/../run.py", "x" * 10_000):
        assert files.shipped(spec) == spec
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mlm.py").touch()
    assert files.shipped("configs/mlm.py") == "configs/mlm.py"


def test_a_config_is_looked_for_where_the_program_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"Did you mean --config={ROOT}/configs/mlm.py?"):
        configs.load("configs/mlm.py")
    with pytest.raises(ConfigError) as caught:
        configs.load("configs/none_such.py")
    assert "Possible" not in str(caught.value)


def test_hints_are_bounded():
    assert did_you_mean("a", []) == ""
    long = "x" * 10_000
    assert len(did_you_mean(long, [long, "y" * 10_000])) < 500
    assert did_you_mean("zz", [str(n) for n in range(21)]) == ""


def test_only_tasks_are_tasks():
    """trials.py has a function `run` with other arguments."""
    with pytest.raises(ConfigError, match="config.task: got 'trials'"):
        configs.load(str(ROOT / "configs/mlm.py"), ["--config.task=trials"])
    configs.load(str(ROOT / "configs/mlm.py"), ["--config.task=report"])


def test_only_what_follows_from_a_failed_save_is_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda found: shown.append(found.exc_value))
    another = [RuntimeError("another"), OSError("Event loop is closed")]
    for error in (RuntimeError("Event loop is closed"), *another):
        startup.show_unraisable(SimpleNamespace(exc_value=error))
    assert shown == another


@pytest.mark.parametrize(("main", "code"), [("None", 0), ("1 / 0", 1)])
def test_a_thread_that_never_ends_does_not_keep_the_program(main, code):
    """Joined by Python at the end; with the bound lowered from ten seconds to a tenth."""
    words = f"""
import sys, threading
sys.argv = ["run.py"]
from fmjax import __main__ as program, startup
startup.prepare, startup.JOIN_SEC = lambda: None, 0.1
def main(words):
    threading.Thread(target=threading.Event().wait).start()
    print("said", end="")
    {main}
program.main = main
program.command()
"""
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "said")
    assert ("ZeroDivisionError" in done.stderr) == bool(code)


@pytest.mark.slow
def test_a_run_whose_saves_fail_ends_and_says_why(tmp_path):
    """Its checkpoints' folder becomes a file; orbax's threads then wait for ten minutes."""
    folder, file = tmp_path / "run", tmp_path / "checkpoints"
    words = ["--config=configs/mlm.py:tiny", f"--workdir={folder}", "--config.total=100000 steps"]
    run = subprocess.Popen([*RUN, *words, "--config.save_every=10"], cwd=ROOT, stderr=-1, text=True)
    while not (folder / "checkpoints" / "10").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    (folder / "checkpoints").rename(file)
    (folder / "checkpoints").write_text("")
    _, said = run.communicate(timeout=120)
    assert run.returncode == CheckpointError.exit_code, said
    assert "3 in a row" in said.splitlines()[-1]
