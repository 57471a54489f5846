"""From a file or a list to pairs that can be trusted: read, split, rendered, checked."""

from pathlib import Path
from typing import Any

from helpers.common import documents

# The source of this wing and its tables as they were imported: part of the key under which its results are kept on
# disk, so that what another version has read or measured is not taken.
CODE = "".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.[py]*")))


def tables(name: str) -> list[Any]:
    """The documents of a YAML file of this wing."""
    return documents(__file__, name)
