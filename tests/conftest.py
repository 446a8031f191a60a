"""Strict: 8 CPU devices, no implicit rank promotion, warnings are errors, shapes are checked.

(Shapes and warnings: see `addopts` and `filterwarnings` in setup.cfg.)
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests run tiny programs once: compiling them well costs more than running them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.extend
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real datasets, not part of the project
CACHE = ROOT / ".pytest_cache" / "fmjax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """One cache for all tests, so that data is prepared and programs are compiled once."""
    monkeypatch.setenv("FMJAX_CACHE", str(CACHE))
    return CACHE


def shared(name: str) -> Path:
    """A folder of real data, or a skip that says what is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data {name!r} is not beside the project (../shared/data)")
    return path


def dots(closed) -> list:
    """All matrix products in a closed jaxpr, those inside calls and loops included."""
    found = []
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns"):
                    inner = jax.extend.core.ClosedJaxpr(inner, ())
                if hasattr(inner, "jaxpr"):
                    found += dots(inner)
    return found
