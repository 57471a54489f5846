"""What `load_pairs` read and left out, kept with the pairs."""

import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from helpers.common import visible

SHOWN_REASONS = 12


@dataclass(frozen=True)
class LoadReport:
    """What `load_pairs` read, and how: rows = rows that became pairs + the rows it left out, those by reason. `bundled`
    says whether they are the pairs that come with this project, so that their licence is known."""

    rows: int
    pairs: int
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # reason -> {"count", "origins": the first five}
    bundled: bool = False
    # Which columns were taken for what, a line each; empty for the three plain ones.
    reading: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The reading, one line of counts, and one more for each reason."""
        out = sum(rows["count"] for rows in self.left_out.values())
        made = f" ({self.pairs} pairs)" if self.pairs != self.rows - out else ""
        lines = [*self.reading, f"{self.rows} rows read, {self.rows - out} kept{made}, {out} left out"]
        groups = sorted(self.left_out.items(), key=lambda item: -item[1]["count"])
        for reason, rows in groups[:SHOWN_REASONS]:
            more = ", ..." if rows["count"] > len(rows["origins"]) else ""
            lines.append(f"  {rows['count']} left out: {visible(reason, 300)} ({', '.join(rows['origins'])}{more})")
        if rest := [rows["count"] for _, rows in groups[SHOWN_REASONS:]]:
            lines.append(f"  {sum(rest)} left out for {len(rest)} other reasons (load_report(pairs).left_out)")
        return "\n".join(lines)


def load_report(pairs: Dataset) -> LoadReport | None:
    """What `load_pairs` said when these pairs were read; None for a dataset that it did not make. The report travels in
    `pairs.info.description`, so it is still there after a split or a selection."""
    try:
        return LoadReport(**json.loads(pairs.info.description))
    except (TypeError, ValueError):
        return None
