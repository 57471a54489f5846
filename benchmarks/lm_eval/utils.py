"""The panel of `retention` for lm-evaluation-harness: its items and its checks are read from helpers/after.

Nothing of helpers is imported: that would load Unsloth, which changes how transformers computes.
"""

import importlib.util
import json
from pathlib import Path

import datasets

AFTER = Path(__file__).parent.parent.parent / "helpers" / "after"
_spec = importlib.util.spec_from_file_location("checks", AFTER / "checks.py")
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)


def load(part: str, **_: object) -> dict[str, datasets.Dataset]:
    """The items of a part of the panel. Their checks are JSON: in Arrow all values of a column have one type."""
    lines = (AFTER / "bundled" / "panel.jsonl").read_text(encoding="utf-8").splitlines()
    items = [item for line in lines if (item := json.loads(line))["part"] == part]
    items = [item | {"checks": json.dumps(item["checks"])} if "checks" in item else item for item in items]
    return {"test": datasets.Dataset.from_list(items)}


def right(doc: dict, results: list[str]) -> dict[str, float]:
    """1 if the reply passes all checks of its item."""
    return {"acc": float(checks.passes(json.loads(doc["checks"]), results[0]))}


def log_prob(doc: dict, results: list[float]) -> dict[str, tuple[float, int]]:
    """The log-prob of a text in nats, and its bytes, for the harness' own sums."""
    sizes = float(results[0]), len(doc["text"].encode("utf-8"))
    return {"bits_per_byte": sizes, "byte_perplexity": sizes}
