"""Writing that leaves nothing half-made.

Whatever a user may lose is written through here: run folders, sweeps, cached log-probs.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[str], object]) -> None:
    """Call `write(temporary_path)`, then rename to `path`: a reader sees the old file or the new, never half of one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value that JSON can hold to `path`, by `write_atomic`."""
    write_atomic(path, lambda part: Path(part).write_text(json.dumps(value, indent=1), encoding="utf-8"))
