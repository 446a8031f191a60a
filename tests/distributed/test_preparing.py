"""A run while its data are prepared: what a signal says and does, and who waits for whom."""

import signal

import pytest
from common import ROOT

from fmjax.config import load as configs
from fmjax.distributed import agreement
from fmjax.errors import DataError, Preempted
from fmjax.io.storage import read_object
from fmjax.params import sharding
from fmjax.tasks import train
from fmjax.training import setup, vmapped_runs


@pytest.fixture
def config():
    return configs.load(str(ROOT / "configs/mlm.py:tiny"), ["--config.tensorboard=False"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_stops_it_at_the_next_poll(config, tmp_path, monkeypatch, capfd, name):
    def prepare(config, mesh, poll):
        signal.raise_signal(signal.Signals[name])
        poll()

    monkeypatch.setattr(vmapped_runs, "prepare", prepare)
    with pytest.raises(Preempted, match=f"stopped by {name} while preparing data") as error:
        train.run(config, tmp_path / "run")
    assert error.value.exit_code == 75
    assert read_object(tmp_path / "run" / "status.json")["state"] == "preempted"
    assert f"{name}: stopping, while data is prepared" in capfd.readouterr().err


def test_a_process_waits_for_the_data_of_all_before_it_computes(config, monkeypatch):
    """Preparing takes hours, for which it hears signals and says for whom it waits."""
    prepared = object()

    def meet(dataset):
        assert dataset is prepared
        raise DataError("process 1 of 2 has other data")

    def compute(*_):
        raise AssertionError("computed before the others were there")

    monkeypatch.setattr(setup, "assemble", lambda *_, **__: None)
    monkeypatch.setattr(setup.data, "prepare", lambda *_, **__: prepared)
    monkeypatch.setattr(agreement, "check_data", meet)
    monkeypatch.setattr(setup, "with_data", compute)
    with pytest.raises(DataError, match="process 1 of 2"):
        setup.setup(config, sharding.make_mesh())
