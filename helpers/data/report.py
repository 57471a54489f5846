"""What `load_pairs` read and left out, kept with the pairs."""

import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class LoadReport:
    """What `load_pairs` read: rows = pairs + the rows it left out, those by reason.

    `bundled` says whether they are the pairs that come with this project, so that their licence is known.
    """

    rows: int
    pairs: int
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "origins": the first five}
    bundled: bool = False

    def __str__(self) -> str:
        """One line, and one more for each reason."""
        lines = [f"{self.rows} rows read, {self.pairs} kept, {self.rows - self.pairs} left out"]
        for reason, rows in self.left_out.items():
            more = ", ..." if rows["count"] > len(rows["origins"]) else ""
            lines.append(f"  {rows['count']} left out: {reason} ({', '.join(rows['origins'])}{more})")
        return "\n".join(lines)


def load_report(pairs: Dataset) -> LoadReport | None:
    """What `load_pairs` said when these pairs were read; None for a dataset that it did not make.

    The report travels in `pairs.info.description`, so it is still there after a split or a selection.
    """
    try:
        return LoadReport(**json.loads(pairs.info.description))
    except (TypeError, ValueError):
        return None
