"""The committed notebooks: valid, portable, and with the parts that each of them has."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 3


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def test_format(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


def test_no_absolute_path_and_no_secret(notebook):
    text = nbformat.writes(notebook)
    # Long enough that base64 pictures do not match by chance.
    assert re.findall(r"(?:/home/|/root/|/Users/|/tmp/|/work/|[A-Z]:\\\\)[\w.-]+", text) == []
    assert re.findall(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,}", text) == []


def test_helpers_come_first_and_shutdown_last(notebook):
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    lines = "\n".join(code).splitlines()
    imported = [match[1] for line in lines if (match := re.match(r"(?:from|import) (\w+)", line))]
    order = [name for name in imported if name in ("helpers", "unsloth", "trl", "transformers", "peft")]
    assert order[0] == "helpers"
    assert code[-1].strip().splitlines()[-1] == "shut_down_kernel()"


def test_parts_of_a_lesson(notebook):
    headings = re.findall(r"^#+ (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    assert {"Recap", "Exercises", "Solutions"} <= set(headings)
    assert headings[0].startswith(tuple("0123456789"))
