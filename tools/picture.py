"""The README's picture, drawn from the committed results: python tools/picture.py

Reads `seeds.json` and `beta.json` in benchmarks/results and writes `measured.png` next to them. Trains nothing.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def main() -> None:
    from helpers.teach.plots import plot_measured
    from helpers.train.sweep import Sweep

    seeds = json.loads((RESULTS / "seeds.json").read_text(encoding="utf-8"))["seeds"]
    figure = plot_measured(seeds, Sweep.load(RESULTS / "beta.json").finished)
    figure.savefig(RESULTS / "measured.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
