"""Compiled programs that were damaged are compiled once more, not at each start."""

import zlib

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

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


def test_jax_reads_through_it(tmp_path, monkeypatch):
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    try:
        compiled_programs.keep_in(tmp_path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compile_ = lambda: jax.jit(lambda x: x * 3 + 1).lower(jnp.ones(3)).compile()
        for _ in range(2):  # what is damaged is compiled without a warning, and kept again
            compile_()
            (entry,) = [file for file in tmp_path.glob("*-cache") if "lambda" in file.name]
            size = entry.stat().st_size
            cut(entry)
            compile_()
            assert entry.stat().st_size == pytest.approx(size, abs=50)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
