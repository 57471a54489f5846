"""Where Unsloth keeps llama.cpp, whose converter writes GGUF files.

The names are in `unsloth_zoo.llama_cpp`, a module that Unsloth does not document. It is imported only when asked for.
"""

import os
from pathlib import Path

from helpers.patches import expect, works


def _places() -> tuple[Path, tuple[str, ...]]:
    from unsloth_zoo.llama_cpp import LLAMA_CPP_CONVERTER_FILENAMES, LLAMA_CPP_DEFAULT_DIR

    return Path(LLAMA_CPP_DEFAULT_DIR), tuple(LLAMA_CPP_CONVERTER_FILENAMES)


def self_test() -> None:
    """Unsloth names a folder and Python files."""
    names = _places()[1]
    expect(bool(names) and all(name.endswith(".py") for name in names), f"the converter's names are {names}")


def converter_places() -> tuple[Path, tuple[str, ...]]:
    """llama.cpp's folder, and the file names that its converter may have there."""
    if works("llama_cpp"):
        return _places()
    folder = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp"
    return Path(folder), ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py")
