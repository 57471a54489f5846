"""Write the notebooks without outputs and without solutions, for learners: python tools/student.py

A solution is a cell with the tag `solution`. The copies go to outputs/student.
"""

from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

ROOT = Path(__file__).parent.parent


def without_answers(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without the cells that are solutions, without outputs, and without the fingerprint of outputs."""
    copy, _ = TagRemovePreprocessor(enabled=True, remove_cell_tags=["solution"])(notebook, {})
    copy, _ = ClearOutputPreprocessor(enabled=True)(copy, {})
    copy.metadata.pop("executed", None)
    return copy


def main(target: Path = ROOT / "outputs" / "student") -> None:
    source = ROOT / "notebooks"
    for path in sorted(source.rglob("*.ipynb")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(without_answers(nbformat.read(path, as_version=nbformat.NO_CONVERT)), copy)
    print(f"{target}: to be handed out in place of notebooks/")


if __name__ == "__main__":
    main()
