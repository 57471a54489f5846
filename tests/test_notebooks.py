"""The committed notebooks: valid, portable, and with the parts that each of them has."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from PIL import Image

from tools.refresh import copy, faults, fingerprint, refresh, target

ROOT = Path(__file__).parent.parent
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [*COURSE, *sorted((ROOT / "notebooks" / "extra").glob("*.ipynb"))]


def test_there_are_notebooks():
    assert [path.name[:2] for path in COURSE] == [f"{number:02d}" for number in range(1, len(COURSE) + 1)]
    assert len(COURSE) >= 3 and len(NOTEBOOKS) > len(COURSE)


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


def test_imports_nothing_deeper_than_the_front_door(notebook):
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert set(re.findall(r"^\s*(?:from|import) (helpers[\w.]*)", code, re.M)) <= {"helpers", "helpers.teach"}


def test_parts_of_a_lesson(notebook):
    headings = re.findall(r"^#+ (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    assert {"Recap", "Exercises", "Solutions"} <= set(headings)
    assert re.match(r"\d\d |Extra: ", headings[0])


def test_a_notebook_is_one_sitting(notebook):
    assert len([cell for cell in notebook.cells if cell.cell_type == "code"]) <= 30
    assert re.search(r"\*\*Time:\*\* (an|half an|a quarter of an) hour", notebook.cells[0].source)


def test_no_cell_is_a_wall(notebook):
    long = [cell.id for cell in notebook.cells if cell.cell_type == "markdown" and len(cell.source.split()) > 150]
    assert long == []


def test_an_extra_leads_back(notebook):
    if notebook.cells[0].source.startswith("# Extra: "):
        for cell in (notebook.cells[0], notebook.cells[-2]):
            assert re.search(r"\]\(\.\./\d\d_\w+\.ipynb\)", cell.source) and "](../../README.md)" in cell.source


def test_outputs_are_complete_and_of_this_source(notebook):
    found = faults(notebook)
    assert not found, "\n".join([*found, "`make refresh` writes the outputs anew."])


CELLS = [
    "print('trl 1.15.0, CPU x86_64, 2 threads')\nprint('and more', flush=True)\nprint('to come')",
    "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(3)): pass\nprint('10%| read\\rdone', flush=True)",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
]


SHOWN = ["trl 1.15.0, CPU x86_64, 2 threads\nand more\nto come\n", "done\n", "a figure\n"]


def made(*sources: str):
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [v4.new_markdown_cell("# 07 Small"), *map(v4.new_code_cell, sources)]
    return v4.new_notebook(cells=cells, metadata=metadata)


def written(folder: Path, *sources: str) -> Path:
    nbformat.write(made(*sources), folder / "07_small.ipynb")
    return folder / "07_small.ipynb"


@pytest.fixture
def small():
    """A notebook without a fault, as a kernel would leave it; none is started for it."""
    notebook = made(*CELLS)
    for number, text in enumerate(SHOWN, 1):
        outputs = [v4.new_output("stream", name="stdout", text=text)]
        notebook.cells[number].update(execution_count=number, outputs=outputs)
    notebook.metadata.executed = fingerprint(notebook)
    assert faults(notebook) == []
    return notebook


@pytest.mark.slow  # it starts a kernel, and so does the next one
def test_refresh_writes_outputs_as_a_page_shows_them(tmp_path):
    refreshed = written(tmp_path, *CELLS)
    refresh(refreshed, tmp_path / "rejected")
    small = nbformat.read(refreshed, as_version=nbformat.NO_CONVERT)
    lines, bar, figure = (cell.outputs for cell in small.cells[1:])
    assert [[(output.name, output.text) for output in outputs] for outputs in (lines, bar)] == [
        [("stdout", text)] for text in SHOWN[:2]
    ]
    picture = Image.open(io.BytesIO(base64.b64decode(figure[0].data["image/png"])))
    assert picture.mode == "P" and picture.width > 300
    assert set(small.metadata) == {"kernelspec", "executed"}
    assert faults(small) == []
    assert list(refreshed.parent.iterdir()) == [refreshed]


@pytest.mark.slow
def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = written(tmp_path, "1 + 1", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"(?s)07_small.ipynb was left as it was.*cell 2 .*ZeroDivisionError"):
        refresh(path, tmp_path / "rejected")
    assert path.read_bytes() == before
    executed = nbformat.read(tmp_path / "rejected" / path.name, as_version=4)
    assert executed.cells[1].outputs[0].data["text/plain"] == "2"


@pytest.mark.slow
def test_a_copy_is_executed_as_far_as_it_runs_and_says_where_it_is(tmp_path, capsys):
    path = written(tmp_path, "print('so far')", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"(?s)07_small.ipynb ends where it failed.*cell 2 .*ZeroDivisionError"):
        copy(path, tmp_path / "copies")
    executed = nbformat.read(tmp_path / "copies" / path.name, as_version=4)
    assert executed.cells[1].outputs[0].text == "so far\n" and executed.cells[2].outputs[0].ename == "ZeroDivisionError"
    assert path.read_bytes() == before
    assert re.match(r"  cell 1 of 2", capsys.readouterr().out)


def test_copies_of_extras_have_a_folder_of_their_own(tmp_path):
    assert target(ROOT / "notebooks" / "extra" / "one.ipynb", tmp_path) == tmp_path / "extra" / "one.ipynb"
    assert target(ROOT / "notebooks" / "01_setup.ipynb", tmp_path) == tmp_path / "01_setup.ipynb"


def shows(text: str, name: str = "stdout"):
    return lambda cells: cells[2].outputs.append(v4.new_output("stream", name=name, text=text))


def displays(**data: str):
    data = {mime.replace("_", "/"): value for mime, value in data.items()}
    return lambda cells: cells[3].outputs.append(v4.new_output("display_data", data=data))


FAULTS = {
    "not all executed": lambda cells: cells[2].update(execution_count=None),
    "in order": lambda cells: cells[2].update(execution_count=7),
    "belong to another source": lambda cells: cells[1].update(source=cells[1].source + " "),
    "another source": lambda cells: cells.append(v4.new_code_cell("1", execution_count=4)),
    "times of the run": lambda cells: cells[1].metadata.update(execution={"iopub.status.busy": "2026-01-01"}),
    "an error": lambda cells: cells[1].outputs.append(v4.new_output("error", ename="E", evalue="", traceback=[])),
    "a stream in pieces": shows("more"),
    "a widget": lambda cells: displays(**{"application/vnd.jupyter.widget-view+json": "{}"})(cells),
    "stderr": shows("something", "stderr"),
    "a progress bar": shows("a\rb\n"),
    "progress bar": shows("Map: 100%|          | 8/8 [00:00<00:00, 22.47 examples/s]"),
    "bar": shows("\u2588\u258f"),
    "a path of this machine": shows("see /home/somebody/outputs/run"),
    "path of this machine": displays(text_html="<b>/opt/venv/lib/python3</b>"),
    "of this machine": shows("C:\\Users"),
    "a library's warning": shows("x.py:3: FutureWarning: gone soon"),
    "no versions": lambda cells: cells[1].outputs.clear(),
    "kB, at most 500": displays(text_plain="x" * 500_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(small, fault):
    FAULTS[fault](small.cells)
    assert [found for found in faults(small) if fault in found], faults(small)


def test_state_of_widgets_is_found(small):
    small.metadata.widgets = {}
    assert faults(small) == ["state of widgets"]


def test_the_fingerprint_is_of_code_in_its_order(small):
    before = fingerprint(small)
    small.cells[0].source = "# 07 Other words"
    assert fingerprint(small) == before
    small.cells[1].source = "from somewhere import (\n    name,\n)\n\n" + small.cells[1].source
    assert fingerprint(small) == before
    small.cells[1].source += "\nname"
    assert fingerprint(small) != before
    small.cells[1].source = small.cells[1].source.removesuffix("\nname")
    small.cells[1], small.cells[2] = small.cells[2], small.cells[1]
    assert fingerprint(small) != before
