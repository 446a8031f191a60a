"""The folder of compiled programs, which jax keeps between starts.

jax never writes over an entry that is there, so that a program that was cut by a kill or a full
disk would be compiled again at each start, for ever. Here an entry that is damaged is removed when
it is read, and written anew. It stays in jax's format, with its digest in a file beside it.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache  # the one way to another kind of folder
from jax._src.lru_cache import LRUCache


class VerifiedCache(LRUCache):
    """Cache of compiled programs for jax that reads undamaged files only.

    After the first error of the folder, which is printed, nothing is read or written any more: jax
    itself would warn at each program.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._fails = False

    def get(self, key: str) -> bytes | None:
        return self._attempt(self._read, key)

    def put(self, key: str, value: bytes) -> None:
        self._attempt(self._write, key, value)

    def _attempt(self, use: Callable[..., bytes | None], *args: Any) -> bytes | None:
        """What `use` gives, or None where the folder cannot be used."""
        if self._fails:
            return None
        try:
            return use(*args)
        except OSError as error:
            self._fails = True
            warn(error)
            return None

    def _read(self, key: str) -> bytes | None:
        value = super().get(key)
        if value is None or self._intact(key, value):
            return value
        for file in (Path(self.path, f"{key}-cache"), self._digest_file(key)):
            with contextlib.suppress(OSError):
                file.unlink()
        return None

    def _write(self, key: str, value: bytes) -> None:
        super().put(key, value)
        self._digest_file(key).write_text(hashlib.sha256(value).hexdigest())

    def _intact(self, key: str, value: bytes) -> bool:
        try:
            return self._digest_file(key).read_text() == hashlib.sha256(value).hexdigest()
        except OSError:  # written by jax alone, or killed before the digest was
            pass
        try:
            compilation_cache.decompress_executable(value)
        except Exception:  # whatever the compressor raises
            return False
        return True

    def _digest_file(self, key: str) -> Path:
        return Path(self.path, f"{key}-sha256")


def warn(error: Exception) -> None:
    """Say that programs are not kept; without them the next start takes longer, no more."""
    print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)


def keep_in(folder: Path) -> None:
    """Keep the programs that this process compiles in `folder`, and look for them there."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.get_file_cache = _open
    compilation_cache.reset_cache()


def _open(path: str) -> tuple[VerifiedCache, str]:
    return VerifiedCache(path, max_size=jax.config.jax_compilation_cache_max_size), path
