"""Execute notebooks and write them in place, with all that they print and draw: python tools/refresh.py FILES

They run in order and share a new output folder, so that they train, and that 06 and the extras find the run of 03. A
notebook is written if it ran to its end and `faults` finds nothing in it; one that fails stays as it was. Prints one
JSON object as its last line: the seconds of each.

With `--copies` first, executed copies go to outputs/notebooks instead. They run with the reader's own settings and
output folder, and with whatever they print.
"""

import ast
import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from PIL import Image

ENVIRONMENT = dict(os.environ)  # the kernels' own, before Unsloth, which comes with helpers, adds to it

from helpers.common import write_atomic  # noqa: E402
from helpers.run.folder import machine, versions  # noqa: E402

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""  # of a terminal: the line is empty again
LIMIT = 500_000  # bytes of a notebook; a repository page refuses large ones
# What tqdm writes: a bar, or a count with its time and rate.
_BAR = re.compile(r"\d+%\|.*\||\[[\d:]+(<[\d:?]+)?, .*/\w+\]\s*$|[\u2588-\u258f]")
_PATH = re.compile(r"(?<![\w.~</:-])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\+Users\b")
_WARNING = re.compile(r"\b\w+Warning:|^WARNING", re.MULTILINE)


def _without_imports(source: str) -> str:
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell magic: all of it counts
        return source
    lines = source.splitlines()
    for node in reversed(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(line for line in lines if line)


def fingerprint(notebook) -> str:
    """Hash of the code cells' sources in their order, without imports: the outputs are theirs.

    Prose can change without a new run, and so can the place that a name is imported from.
    """
    sources = [_without_imports(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def _settled(text: str) -> str:
    # As a terminal shows it: what \r went back over is gone. A finished bar has nothing more to say.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if not _BAR.search(line))


def _merged(outputs: list) -> list:
    merged = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def small_png(picture: bytes) -> bytes:
    """The PNG `picture` with a palette of 256 colours: a third of the bytes, and line drawings look the same."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def clean(notebook) -> None:
    """Outputs as a page shows them: streams in one piece and without bars, pictures small, no trace of the run."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        outputs = _merged(cell.outputs)
        for output in outputs:
            if output.output_type == "stream":
                output.text = _settled(output.text)
            elif "image/png" in output.get("data", {}):
                picture = base64.b64decode(output.data["image/png"])
                output.data["image/png"] = base64.b64encode(small_png(picture)).decode()
        # Merged again, since a bar may have stood between two pieces.
        cell.outputs = _merged([o for o in outputs if o.output_type != "stream" or o.text.strip()])


def _texts(cell) -> list[str]:
    """All that a cell shows in letters; pictures inside HTML are left out."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts += [output.text] if output.output_type == "stream" else []
        texts += [str(value) for mime, value in data.items() if not mime.startswith("image/")]
    return [re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text) for text in texts]


def faults(notebook) -> list[str]:
    """What is wrong with an executed notebook, in words; an empty list if it can be committed."""
    found = []
    cells = [(place, cell) for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if [cell.execution_count for _, cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells were not all executed, in order, by a new kernel")
    if notebook.metadata.get("executed") != fingerprint(notebook):
        found.append("outputs belong to another source")
    if "widgets" in notebook.metadata:
        found.append("state of widgets")
    for place, cell in cells:
        where = f"cell {place} ({cell.id}): "
        if "execution" in cell.metadata:
            found.append(where + "times of the run")
        kinds = [(output.output_type, output.get("name")) for output in cell.outputs]
        if any(kind == "error" for kind, _ in kinds):
            found.append(where + "an error")
        if any(one == other and one[0] == "stream" for one, other in itertools.pairwise(kinds)):
            found.append(where + "a stream in pieces")
        if any("widget" in mime for output in cell.outputs for mime in output.get("data", {})):
            found.append(where + "a widget")
        found += [where + "stderr: " + output.text[:80] for output in cell.outputs if output.get("name") == "stderr"]
        for text in _texts(cell):
            if "\r" in text or any(_BAR.search(line) for line in text.splitlines()):
                found.append(where + "a progress bar")
            found += [where + "a path of this machine: " + match[0] for match in _PATH.finditer(text)]
            found += [where + "a library's warning: " + match[0] for match in _WARNING.finditer(text)]
    shown = "\n".join(text for _, cell in cells for text in _texts(cell))
    if not re.search(r"\btrl\W+\d+\.\d", shown) or not re.search(r"CPU \w+, \d+ threads|NVIDIA|AMD", shown):
        found.append("no versions or no machine printed")
    size = len(nbformat.writes(notebook).encode())
    if size >= LIMIT:
        found.append(f"{size / 1000:.0f} kB, at most {LIMIT / 1000:.0f}")
    return found


class Client(NotebookClient):
    """Executes a notebook and says how far it is: the cell, and the last line that it printed."""

    cell, said = 0, 0.0  # the place of the cell that runs; when the last line was written

    def say(self, cell_index: int, text: str = "") -> None:
        """Over the line before on a terminal; in a log one line in half a minute is enough."""
        self.cell = cell_index
        cells = [cell.cell_type == "code" for cell in self.nb.cells]
        line = f"  cell {sum(cells[: cell_index + 1])} of {sum(cells)}  {text}"
        if sys.stdout.isatty():
            print(f"{CLEAR}{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif time.monotonic() - self.said > 30:
            print(line.rstrip(), flush=True)
            self.said = time.monotonic()

    def output(self, outs, msg, display_id, cell_index):
        """As NotebookClient does, and a stream's last line is shown."""
        if lines := msg["content"].get("text", "").split("\n"):
            self.say(cell_index, next((line for line in reversed(lines) if line.strip()), ""))
        return super().output(outs, msg, display_id, cell_index)


def execute(path: Path, **settings: str) -> tuple[nbformat.NotebookNode, list[str]]:
    """The executed notebook, and what failed in it; `settings` are variables for its environment."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    where = {"metadata": {"path": str(path.parent)}}
    quiet = ["--IPKernelApp.log_level=40"]  # it would warn that it speaks over TCP, to this machine alone
    client = Client(notebook, timeout=3600, record_timing=False, resources=where, extra_arguments=quiet)
    client.on_cell_start = lambda cell, cell_index: cell.cell_type == "code" and client.say(cell_index)
    problems = []
    try:
        client.execute(env=ENVIRONMENT | settings)
    except (CellControlSignal, DeadKernelError) as error:
        problems = [f"cell {client.cell} ({notebook.cells[client.cell].id}) failed:\n{error}"]
    notebook.metadata = metadata | {"executed": fingerprint(notebook)}
    clean(notebook)
    return notebook, problems


def write(notebook: nbformat.NotebookNode, target: Path) -> None:
    """Write a notebook where everyone may read it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, lambda part: nbformat.write(notebook, part))
    target.chmod(0o644)  # a temporary file is its owner's alone


def copy(path: Path, copies: Path) -> None:
    """Execute a notebook and write the result into the folder `copies`. Raises RuntimeError if a cell fails."""
    notebook, problems = execute(path)
    write(notebook, target(path, copies))
    if problems:
        raise RuntimeError("\n".join([f"{target(path, copies)} ends where it failed.", *problems]))


def target(path: Path, folder: Path) -> Path:
    """The place of a notebook's copy in `folder`: extras are in a folder of their own there too."""
    return folder / (path.relative_to(NOTEBOOKS) if path.is_relative_to(NOTEBOOKS) else path.name)


def refresh(path: Path, rejected: Path, **settings: str) -> None:
    """Execute a notebook and write it in place.

    Args:
        settings: variables for its environment.
        rejected: folder for the executed copy of a notebook that cannot be written in place.

    Raises:
        RuntimeError: a cell fails, or the executed notebook has faults; the text names them.
    """
    notebook, problems = execute(path, **settings)
    problems = problems or faults(notebook)
    place = target(path, rejected) if problems else path
    write(notebook, place)
    if problems:
        raise RuntimeError("\n".join([f"{path.name} was left as it was; the executed copy is {place}.", *problems]))


def main(paths: list[Path], copies: bool = False) -> None:
    # A person's own settings are not for the committed outputs.
    settings = dict.fromkeys(("DPO_PROFILE", "DPO_MODEL", "DPO_THINKING_MODEL", "DPO_DATA"), "")
    seconds, elsewhere = {}, ROOT / "outputs" / "notebooks"
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(paths):
            began = time.monotonic()
            print(path.name, flush=True)
            try:
                copy(path, elsewhere) if copies else refresh(path, elsewhere, DPO_OUTPUT_DIR=folder, **settings)
            except RuntimeError as error:
                sys.exit(f"{CLEAR}{error}")
            seconds[path.stem] = round(time.monotonic() - began, 1)
            print(f"{CLEAR}{path.name}: {seconds[path.stem]:.0f} s", flush=True)
    print(json.dumps({"seconds": seconds, "versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--copies"]
    main([Path(name).resolve() for name in names], copies=len(names) < len(sys.argv) - 1)
