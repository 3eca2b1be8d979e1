"""Shared by all tests. Imports neither jax nor torch: an environment with one of them must run its own tests."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# `tests` is on sys.path for `oracle` and friends; without the root before it, tests/interop would pass as `interop`.
sys.path.insert(0, str(ROOT))

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

# Processes of pytest-xdist share the cores: threads of torch and BLAS beyond them would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tolerances are those of float32: on a GPU, jax would multiply it in TF32 (tests/jax/test_devices.py).
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Eight devices for tests of meshes; before jax is imported anywhere.
FORCED_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FORCED_DEVICES}".strip()

_checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("local", deadline=None, max_examples=25, suppress_health_check=_checks)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

OPT_IN = {
    "slow": "minutes long: run with -m slow",
    "scale": "minutes, and gigabytes: run with -m scale",
    "gpu": "needs a CUDA device: run with -m gpu",
}


def pytest_collection_modifyitems(config, items):
    """Skip what must be asked for, unless the -m expression names it; files that take little time come last.

    So the processes of pytest-xdist, which take one file after the other, end at nearly the same time.
    """
    items.sort(key=lambda item: item.path.is_relative_to(ROOT / "tests" / "interop"))
    asked = config.getoption("markexpr") or ""
    for item in items:
        for marker, reason in OPT_IN.items():
            if item.get_closest_marker(marker) and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng():
    return np.random.default_rng(0)
