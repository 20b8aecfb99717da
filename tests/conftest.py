"""64-bit on, silent rank promotion an error, and two CPU devices so that sweeps are spread over several.

Most of the time of a quick test is compilation. With the flags below a program of `solve` compiles in a quarter of the
time, and runs three times slower. What is compiled computes the same to rounding. Where tests marked `long` or
`package` are asked for, programs are as users have them.
"""

import gc
import os
from pathlib import Path

PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"  # shared by workers, commands and later runs
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
os.environ.setdefault("EQX_ON_ERROR", "nan")  # as the command line does: a program that can raise cannot be kept
os.environ["MPLBACKEND"] = "Agg"

import jax  # noqa: E402
import jaxlib  # noqa: E402
import pytest  # noqa: E402
from _pytest.mark.expression import Expression  # noqa: E402

QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version_info__ < (0, 11):  # newer ones have no other way, and end at a flag that they do not know
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

from lora_flow import aligned_problem  # noqa: E402

MAPS = 16_000  # a quarter of the memory maps that Linux grants a process; a module of tests takes up to half


def pytest_configure(config):
    selects = Expression.compile(config.option.markexpr or "not none").evaluate
    if not any(selects(lambda name, mark=mark, **_: name == mark) for mark in ("long", "package")):
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *QUICK])  # JAX reads it at its first computation


def pytest_collection_finish():
    """What is imported stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each takes dozens of memory maps; thousands of programs in one process meet Linux's limit, and XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def figure1_problem():
    """The problem of Figure 1: 10 x 10, h = 100, delta_w = 1/1.05^2, shift 5 u v^T along the top pair."""
    return aligned_problem(jax.random.key(0))
