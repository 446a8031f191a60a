"""What processes of one run may not differ in, as process 1 finds it of process 0."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from fmjax.checkpoints import pretrained
from fmjax.data.settings import DataSettings
from fmjax.data.texts import TextDataset
from fmjax.data.vocabulary import Vocab
from fmjax.distributed import agreement, processes
from fmjax.errors import ConfigError, DataError
from fmjax.io import environment

CONFIG = {"seed": 0, "data": {"cache": "a", "workers": 1}, "token": "secret", "rates": (1, 2)}


def config(**changes):
    return ConfigDict(CONFIG | changes).lock()


def vocab(**changes):
    none = np.zeros(8, bool)
    return Vocab(8, 0, 1, (2,), (3,), none, none)._replace(**changes)


def dataset(**changes):
    splits = {"train": range(100), "validation": range(5)}
    fields = dict(digest="a", format="b", counts={}, vocab=vocab(), labels=("x", "y"))
    fields["settings"] = DataSettings()
    return TextDataset(**fields | dict(splits=splits) | changes)


@pytest.fixture
def in_process_0(monkeypatch):
    """Makes process 0 say what another call has said."""

    def say(check, *args):
        said = []
        with monkeypatch.context() as patch:
            patch.setattr(processes, "first", lambda call: said.append(call()) or said[0])
            check(*args)
        monkeypatch.setattr(processes, "first", lambda call: said[0])

    return say


FLAGS = {"dry_run": False, "workdir": "/runs/a"}


@pytest.mark.parametrize(
    "config_, flags, versions, said",
    [
        (config(seed=1), {}, {}, "config.seed=1 here, 0 in process 0"),
        (config(more=1), {}, {}, "config.more=1 here, None in process 0"),
        (config(), {"dry_run": True}, {}, "--dry_run=True here, False in process 0"),
        (config(), {"workdir": "/b"}, {}, "--workdir='/b' here, '/runs/a' in process 0"),
        (config(), {}, {"fmjax": "1 ab"}, "the version of fmjax='1 ab' here, '0.1.0 .*'"),
        (config(), {}, {"jax": "0.1"}, "the version of jax='0.1' here, '0.*' in process 0"),
    ],
)
def test_other_starts_are_refused(in_process_0, monkeypatch, config_, flags, versions, said):
    in_process_0(agreement.check_start, config(), FLAGS)
    agreement.check_start(config(), FLAGS)
    found = environment.environment() | versions
    monkeypatch.setattr(environment, "environment", lambda: found)
    with pytest.raises(ConfigError, match=f"started alike, with the same config: {said}"):
        agreement.check_start(config_, FLAGS | flags)


def test_what_a_process_has_for_itself_may_differ(in_process_0, monkeypatch):
    in_process_0(agreement.check_start, config(), FLAGS)
    found = environment.environment() | {"system": "Linux, another processor"}
    monkeypatch.setattr(environment, "environment", lambda: found)
    own = {"cache": "b", "workers": 7}
    agreement.check_start(config(data=own, token="another"), FLAGS)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"digest": "c"}, "the digest of the contents='c' here, 'a' in process 0"),
        ({"format": "c"}, "the digest of the rows="),
        ({"vocab": vocab(pad_id=1)}, "the digest of the vocabulary="),
        ({"vocab": vocab(word_start=np.ones(8, bool))}, "the digest of the vocabulary="),
        ({"labels": ("y", "x")}, r"the classes=\['y', 'x'\] here, \['x', 'y'\]"),
        ({"splits": {"train": range(100)}}, "rows of validation=None here, 5 in process 0"),
    ],
)
def test_other_data_are_refused(in_process_0, changes, said):
    in_process_0(agreement.check_data, dataset())
    agreement.check_data(dataset())
    with pytest.raises(DataError, match=f"the same data: {said}.*Copy the files"):
        agreement.check_data(dataset(**changes))


def test_a_single_process_agrees_with_itself():
    agreement.check_start(config(), FLAGS)
    agreement.check_data(dataset())


def test_the_data_of_every_task_are_compared(monkeypatch):
    compared, made = [], dataset()
    monkeypatch.setattr(pretrained.data, "prepare", lambda *_, **__: made)
    monkeypatch.setattr(agreement, "check_data", compared.append)
    model = tiny.model("bert")
    opened = SimpleNamespace(tokenizer="folder", model=model)
    assert pretrained.Opened.prepare(opened, {}) is made and compared == [made]
