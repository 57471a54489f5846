"""What training cost on questions unlike its pairs: the limits, and the sentence. `retention` measures the figures."""

import json
import math
from pathlib import Path
from typing import Any

from helpers.common import documents
from helpers.run import unreadable

LOST: dict[str, dict[str, Any]] = documents(__file__, "retained.yaml")[0]
RETAINED_FILE = "retention.json"  # in the folder of a run
Parts = dict[str, dict[str, float]]  # by the names of LOST: items, means before and after, change, its low and high


def lost_parts(parts: Parts) -> list[str]:
    """The names of the `parts` that were lost, by the limits in retained.yaml. What is no number is lost too."""
    known = ((name, one["change"], one["high"], LOST[name]["limit"]) for name, one in parts.items())
    return [name for name, change, high, limit in known if not (change >= -limit or high >= 0)]


def retained_line(parts: Parts) -> str:
    """One sentence on `parts`: nothing found to be lost, or what fell, and by how much."""
    texts = []
    for name in lost_parts(parts):
        one, what = parts[name], LOST[name]["what"]
        fell = f"fell by {-one['change']:.2f} (95%: {-one['high']:.2f} to {-one['low']:.2f})"
        texts.append(f"{what} {fell if math.isfinite(one['change']) else 'is no number'}")
    return "; ".join(texts) or "nothing found to be lost"


def retained_parts(folder: Path) -> Parts:
    """What `retention` left in a run's `folder`; empty if it left nothing. Raises UserError for another file."""
    try:
        parts = json.loads((folder / RETAINED_FILE).read_bytes())["parts"]
        names = ("items", "before", "after", "change", "low", "high")
        return {name: {key: float(parts[name][key]) for key in names} for name in LOST if name in parts}
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable("retention", folder=folder.name, error=error) from error
