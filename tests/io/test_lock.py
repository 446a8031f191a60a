"""One process works in a folder, even after somebody has removed its lock file."""

import errno
import fcntl
import os

import pytest
from ml_collections import ConfigDict

from fmjax.errors import CheckpointError
from fmjax.io import lock, storage, workdir

CONFIG = ConfigDict({"seed": 0}).lock()


def test_row15_a_removed_lock_file_lets_no_second_run_in(tmp_path):
    with workdir.open(tmp_path, CONFIG) as folder:
        (tmp_path / "lock.json").unlink()
        with pytest.raises(lock.InUse, match="by a run whose lock.json was removed"):
            with workdir.open(tmp_path, CONFIG):
                raise AssertionError
        folder.lock.hold()
        with pytest.raises(lock.InUse, match=f"pid {os.getpid()},"):
            with workdir.open(tmp_path, CONFIG):
                raise AssertionError
    with workdir.open(tmp_path, CONFIG):
        pass


@pytest.fixture
def no_folder_locks(monkeypatch):
    """As on a network file system, where folders are not locked."""
    real = fcntl.flock

    def flock(file, how):
        if isinstance(file, int):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_row15_the_first_of_two_notices_at_its_next_save(tmp_path, no_folder_locks):
    said = []
    with lock.locked(tmp_path, said.append) as first:
        first.hold()
        assert said == []
        (tmp_path / "lock.json").unlink()
        with lock.locked(tmp_path, said.append):
            with pytest.raises(lock.InUse, match="is in use .*pid"):
                first.hold()
        first.hold()
        assert len(said) == 1 and "was removed while this run works here" in said[0]
        assert lock.is_locked(tmp_path / "lock.json")
        first.hold()
        assert len(said) == 1
    assert not lock.is_locked(tmp_path / "lock.json")


def test_a_lock_that_another_replaces_in_between_is_taken_anew(tmp_path, no_folder_locks):
    """Between opening and locking the holder before ended and removed its file."""
    opened, real = [], lock.Lock._lock

    def replace(self, file):
        if not opened:
            (tmp_path / "lock.json").unlink()
            (tmp_path / "lock.json").touch()
        opened.append(file)
        real(self, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.Lock, "_lock", replace)
        with lock.locked(tmp_path, print):
            assert len(opened) == 2 and opened[0].closed
            assert lock.is_locked(tmp_path / "lock.json")


def test_locks_of_one_folder_under_other_names_do_not_meet(tmp_path):
    with lock.locked(tmp_path, print, "a.json"), lock.locked(tmp_path, print, "b.json"):
        assert lock.is_locked(tmp_path / "a.json")


# ---- Folders that cannot be written --------------------------------------------------------


def test_row24_a_name_that_is_not_utf8_is_refused_first(tmp_path):
    bad = tmp_path / os.fsdecode(b"bad\xff")
    with pytest.raises(CheckpointError, match=r"bad\\udcff' is not UTF-8.*PYTHONUTF8=1"):
        workdir.check(bad, CONFIG)
    with pytest.raises(CheckpointError, match="is not UTF-8"), workdir.open(bad, CONFIG):
        raise AssertionError
    assert not bad.exists()
    with workdir.open(tmp_path / "gut€", CONFIG):
        pass


@pytest.mark.parametrize("name", ["config.json.tmp", "lock.json"])
def test_row24_a_folder_that_turns_unwritable_is_an_error_of_storage(tmp_path, name):
    """A folder of that name stops everybody from writing the file, root too."""
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Is a dir.*--workdir"):
        with workdir.open(tmp_path, CONFIG):
            raise AssertionError


def test_only_errors_about_files_of_the_folder_are_errors_of_storage(tmp_path):
    with pytest.raises(CheckpointError, match="run/a cannot be written"):
        with storage.writing_in(tmp_path / "run"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "a"))
    for name in (str(tmp_path / "data.txt"), None, 7):
        with pytest.raises(PermissionError), storage.writing_in(tmp_path / "run"):
            raise PermissionError(errno.EACCES, "Permission denied", name)
