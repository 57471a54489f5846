"""CI has an hour, and a machine whose CPU has no bf16 of its own needs two for everything.

Where DPO_TESTS_UNTIL and DPO_NOTEBOOKS_UNTIL are set (seconds since 1970; `.ci/run` sets them), no slow test is begun
after the one and no notebook that would end after the other. What was left out is named in the summary, and the limit
on coverage, which counts on all tests, is then not applied. Nothing is left out elsewhere.
"""

import os
import time
from pathlib import Path

import pytest

# Slow tests that are begun first, where not all can be.
FIRST = ("test_training", "test_export", "test_sweep", "test_shared_prompt", "test_models", "test_generation")
LAST = "test_jupyterlab"  # what it runs, the notebooks' own tests run too
# Minutes that the notebooks took under `make refresh` on two cores with bf16.
MINUTES = {"01_setup": 0.3, "02_data": 0.3, "03_train": 2.4, "04_thinking_pairs": 4.3, "05_beta_sweep": 9.4}
MINUTES |= {"06_inspect": 2.9}


def _until(name: str) -> float:
    return float(os.environ.get(name) or "inf")


def _is_notebook(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb"


def _slowness() -> float:
    """How many times as long as above notebooks take here, about."""
    cpu = Path("/proc/cpuinfo")
    return 3.6 if cpu.is_file() and "bf16" not in cpu.read_text() else 1.0  # avx512_bf16, amx_bf16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the fast tests first, then the slow ones of `FIRST`."""
    if _until("DPO_TESTS_UNTIL") == float("inf"):
        return

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.stem
        order = FIRST.index(name) if name in FIRST else len(FIRST) + (name == LAST)
        return bool(item.get_closest_marker("slow")), order

    items.sort(key=place)  # stable: the order within a file stays


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would be begun too late."""
    if _is_notebook(item):
        if _until("DPO_NOTEBOOKS_UNTIL") == float("inf"):
            return
        late = time.time() + 60 * MINUTES[item.path.stem] * _slowness() > _until("DPO_NOTEBOOKS_UNTIL")
    else:
        late = bool(item.get_closest_marker("slow")) and time.time() > _until("DPO_TESTS_UNTIL")
    if not late:
        return
    coverage = item.config.pluginmanager.getplugin("_cov")
    if coverage is not None:
        coverage.options.cov_fail_under = 0
    pytest.skip("no time left for it on a machine as slow as this one")
