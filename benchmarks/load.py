"""Reading 200,000 rows: seconds of CPU, and memory that must not grow with the file.

    python benchmarks/load.py [--rows 200000] [--forms texts]

JSONL of three forms (texts; conversations; two answers and a winner), each read at a tenth of the rows and at all of
them, by a process of its own that finds nothing in the cache of datasets. Seconds are of this process's CPU. Memory is
the peak of anonymous memory above what the process held before; Arrow tables are mapped from disk and do not count.
Another version of the package is measured with PYTHONPATH set to its folder. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMS = ("texts", "messages", "winner")


def rows_of(form: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows of about 700 characters, no two alike."""
    for number in range(count):
        question = f"Question {number}: what is {number} plus {number % 7}, and why is it so? " * 2
        good, bad = f"It is {number + number % 7}. " * 20, f"I think that it is {number}, more or less. " * 8
        if form == "texts":
            yield {"prompt": question, "chosen": good, "rejected": bad}
        elif form == "messages":
            sides = {
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
            yield {"prompt": [{"role": "user", "content": question}], **sides}
        else:
            a, b = (good, bad) if number % 2 else (bad, good)
            yield {"question": question, "response_a": a, "response_b": b, "winner": "ba"[number % 2], "source": "made"}


def anonymous_mb() -> float:
    """Anonymous memory of this process."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def measure(path: Path) -> dict[str, Any]:
    """Seconds of CPU and peak memory of one call."""
    import helpers

    helpers.load_pairs([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])  # imports
    held, peaks, done = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peaks.append(anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.process_time()
    pairs = helpers.load_pairs(path)
    seconds = time.process_time() - begin
    done.set()
    thread.join()
    return {"pairs": len(pairs), "cpu_seconds": round(seconds, 2), "peak_mb": round(max(peaks) - held, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    results = {}
    for form in args.forms:
        for count in (args.rows // 10, args.rows):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{form}.jsonl"
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows_of(form, count))
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", str(path)],
                    env={**os.environ, "HF_DATASETS_CACHE": folder},
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                )
            results[f"{form} {count}"] = json.loads(done.stdout.splitlines()[-1])
            print(form, results[f"{form} {count}"], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
