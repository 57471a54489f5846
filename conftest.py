"""CI has 70 minutes, and a CPU that computes in 32 bits needs an hour and a half for everything.

There no slow test begins after DPO_TESTS_UNTIL and no notebook after DPO_NOTEBOOKS_UNTIL (seconds since 1970;
`.ci/run` sets them), nor one that is known to end after it. The summary names what was left out. The limit on coverage
needs all tests, so it is then not applied. Without these variables nothing is left out.
"""

import os
import time
from pathlib import Path

import pytest

# Slow tests that begin first, if there is no time for all.
FIRST = (
    "tests/test_way",
    "tests/test_course",
    "rehearsal/test_rehearsal",
    "train/test_interrupted",
    "train/test_rows",
    "train/test_dpo",
    "train/test_processes",
    "train/test_settings",
    "after/test_export",
    "train/test_sweep",
    "patches/test_shared_prompt",
    "model/test_identity",
    "model/test_load",
    "model/test_generate",
)
LAST = "tests/test_jupyterlab"  # what it runs, the notebooks' own tests run too
# Minutes on two such cores of what takes many, with room: alone, 03, 04 and 05 took 6, 13 and 22.
MINUTES = {
    "01_setup": 2,
    "02_data": 0.7,
    "03_train": 5,
    "04_thinking_pairs": 20,
    "05_beta_sweep": 30,
    "06_inspect": 7,
    "hand_over": 4,
    "memory_and_precision": 3,
    "on_policy": 9,
    "what_was_forgotten": 6,
    "when_training_goes_wrong": 4,
    "test_every_symptom_is_reproduced_named_and_cured": 20,
    "test_runs_in_jupyterlab[03_train]": 4,
}
CPU = Path("/proc/cpuinfo")
# Computes in 32 bits: without avx512_bf16 and amx_bf16, or because it was told to.
SLOW = os.environ.get("UNSLOTH_CPU_BF16") == "0" or (CPU.is_file() and "bf16" not in CPU.read_text())


def _until(name: str) -> float:
    return float(SLOW and os.environ.get(name) or "inf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the fast tests first, then the slow ones of `FIRST`; of the notebooks the long ones last."""
    if _until("DPO_TESTS_UNTIL") == float("inf"):
        return

    def place(item: pytest.Item) -> tuple[bool, int]:
        if item.path.suffix == ".ipynb":
            return False, MINUTES.get(item.path.stem, 0) > 10
        name = f"{item.path.parent.name}/{item.path.stem}"  # two folders have a test_load
        order = FIRST.index(name) if name in FIRST else len(FIRST) + (name == LAST)
        return bool(item.get_closest_marker("slow")), order

    items.sort(key=place)  # stable: the order within a file stays


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would be begun too late."""
    is_notebook = item.path.suffix == ".ipynb"
    if not is_notebook and not item.get_closest_marker("slow"):
        return
    end = time.time() + 60 * MINUTES.get(item.path.stem if is_notebook else item.name, 0)
    late = end > _until("DPO_NOTEBOOKS_UNTIL" if is_notebook else "DPO_TESTS_UNTIL")
    if not late:
        return
    coverage = item.config.pluginmanager.getplugin("_cov")
    if coverage is not None:
        coverage.options.cov_fail_under = 0
    pytest.skip("no time left for it on a machine as slow as this one")
