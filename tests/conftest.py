"""Strict: 8 CPU devices, no implicit rank promotion, warnings are errors, shapes are checked.

(Shapes and warnings: see `addopts` and `filterwarnings` in setup.cfg.)
"""

import gc
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests run tiny programs once: compiling them well costs more than running them, and two at once
# compile on a core each. Versions of jaxlib that do not know the later flags abort.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith("0.10.")
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jax
import pytest
from common import CACHE

# Tracing makes many objects and hardly any circles: looking for these took a tenth of the time.
gc.set_threshold(100_000, 20, 50)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Nothing is judged by time, which a busy machine decides.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
pytest.register_assert_rewrite("runs")  # a module of fixtures and assertions


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """One cache for all tests, so that data is prepared and programs are compiled once."""
    monkeypatch.setenv("FMJAX_CACHE", str(CACHE))
    return CACHE
