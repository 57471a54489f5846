"""Writing that leaves nothing half-made."""

import json
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: a reader sees the old file or the new one, never half of one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    write_atomic(path, lambda part: Path(part).write_text(json.dumps(value, indent=1), encoding="utf-8"))
