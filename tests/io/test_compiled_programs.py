"""Compiled programs that were damaged are compiled once more, not at each start."""

import contextlib
import os
import shutil
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from fmjax.distributed import launch
from fmjax.io import compiled_programs
from fmjax.io.compiled_programs import VerifiedCache

VALUE = zlib.compress(b"a program" * 100)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("digest", [True, False])
def test_a_damaged_program_is_removed_and_written_anew(tmp_path, monkeypatch, damage, digest):
    # The checksum of zlib finds both where there is no digest, as in folders of jax alone.
    monkeypatch.setattr(compilation_cache, "decompress_executable", zlib.decompress)
    programs = VerifiedCache(str(tmp_path), max_size=-1)
    programs.put("key", VALUE)
    assert programs.get("key") == VALUE
    if not digest:
        (tmp_path / "key-sha256").unlink()
        assert programs.get("key") == VALUE
    damage(tmp_path / "key-cache")
    assert programs.get("key") is None and list(tmp_path.iterdir()) == []
    programs.put("key", VALUE)
    assert programs.get("key") == VALUE


@contextlib.contextmanager
def settings_of_jax():
    """Restores what `keep_in` changes."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    opens = compilation_cache.get_file_cache
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.get_file_cache = opens
        compilation_cache.reset_cache()


def compile_(number):
    return jax.jit(lambda x: x * number + 1).lower(jnp.ones(3)).compile()


def test_jax_reads_through_it(tmp_path):
    with settings_of_jax():
        compiled_programs.keep_in(tmp_path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for _ in range(2):  # what is damaged is compiled without a warning, and kept again
            compile_(3)
            (entry,) = [file for file in tmp_path.glob("*-cache") if "lambda" in file.name]
            size = entry.stat().st_size
            cut(entry)
            compile_(3)
            assert entry.stat().st_size == pytest.approx(size, abs=50)


def test_a_folder_that_turns_unusable_is_one_line(tmp_path, capsys):
    """A warning of jax, which would come at each program, is an error here."""
    folder = tmp_path / "xla"
    with settings_of_jax():
        compiled_programs.keep_in(folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for number in range(4):
            assert compile_(number)(jnp.ones(3)).tolist() == [number + 1] * 3
            if number == 0:
                assert list(folder.glob("*-cache"))
                shutil.rmtree(folder)
                folder.write_text("a file")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept: [Errno")
    assert str(folder) in line


@pytest.mark.parametrize("damage", ["removed", "full", "unreadable"])
def test_an_error_of_the_folder_is_said_once(tmp_path, monkeypatch, capsys, damage):
    programs = VerifiedCache(str(tmp_path / "xla"), max_size=-1)
    programs.put("key", VALUE)

    def fails(*args):
        raise OSError(28, "No space left on device")

    if damage == "removed":
        shutil.rmtree(tmp_path / "xla")
    else:
        name = "write_bytes" if damage == "full" else "read_bytes"
        monkeypatch.setattr(type(programs.path), name, fails)
    for name in ("one", "other"):
        assert programs.get("key" if damage == "unreadable" else name) is None
        programs.put(name, VALUE)
    assert capsys.readouterr().err.count("compiled programs are not kept") == 1


@pytest.mark.parametrize("place", ["/proc/x", "a file", "of another user"])
def test_a_run_goes_on_where_no_program_can_be_kept(tmp_path, monkeypatch, capsys, place):
    if place == "a file":
        place = tmp_path / "file" / "cache"
        place.parent.write_text("")
    elif place == "of another user":
        place = tmp_path
        monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    monkeypatch.setenv("FMJAX_CACHE", str(place))
    with settings_of_jax():
        jax.config.update("jax_compilation_cache_dir", None)
        launch._keep_programs()
        assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept: ") and str(place) in line
    assert "config.data.cache" not in line  # which is for data alone
