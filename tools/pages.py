"""Write the course as pages that need no network: python tools/pages.py

The notebooks as they are committed, the README as the first page, and `docs/` go to outputs/site. Sphinx with MyST-NB
makes the pages. Whatever it warns about, such as a link that leads nowhere, makes it fail.
"""

import html
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import nbformat
from docutils import nodes
from latex2mathml.converter import convert_to_element
from nbformat import v4
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
# What the pages are made from; the pages after the notebooks in their order.
PAGES = ["docs/*.md", "helpers/*/bundled/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
FILES = [
    "README.md",
    "notebooks/*.ipynb",
    "notebooks/extra/*.ipynb",
    *PAGES,
    "CITATION.cff",
    "benchmarks/results/*.png",
]
CONTENTS = """
```{{toctree}}
:hidden:
:glob:

notebooks/*
notebooks/extra/*
{pages}
```
"""
STYLE = """
details.solution > summary { cursor: pointer; font-weight: bold; margin: 0.5rem 0; }
.cell_output table { border: 0; border-collapse: collapse; font-size: 0.8rem; }
.cell_output :is(th, td) { border: 0; border-bottom: 1px solid var(--color-background-border); padding: 0.2rem 0.5rem; }
math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", math; }
math[display="block"] { overflow-x: auto; overflow-y: hidden; margin: 1rem 0; }
"""
SETTINGS = {
    "extensions": ["myst_nb", __name__],
    "project": "DPO Notebooks",
    "html_title": "DPO Notebooks",
    "html_theme": "furo",
    "html_math_renderer": "mathml",
    "html_css_files": ["course.css"],
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_search_summary": False,  # it would fetch the pages, which a browser refuses for files
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 4,
    "nb_execution_mode": "off",
    "suppress_warnings": ["misc.highlighting_failure"],  # a cell magic; it is tried again, less strictly
}


def mathml(tex: str, display: str) -> str:
    """A TeX formula as MathML, which browsers draw without a script or a font of ours."""
    tex = re.sub(r"(\\math[a-z]+) (\w)", r"\1{\2}", tex)  # without braces the converter leaves out the letter's style
    tree = convert_to_element(tex, display=display)
    for part in tree.iter():
        part.text = html.unescape(part.text or "")  # the converter writes signs as entities, and all else as it is
        if "\\" in part.text:
            raise ValueError(f"{part.text} in ${tex}$ is not known to latex2mathml")
        if part.tag == "mi" and len(part.text) > 1:  # log, ln
            part.set("style", "padding-inline: 0.15em")
    return ElementTree.tostring(tree, encoding="unicode")


def setup(app: Sphinx) -> None:
    """This module as an extension of Sphinx: formulas become MathML."""

    def write(writer, node, display):
        try:
            writer.body.append(mathml(node.astext(), display))
        except ValueError as error:
            logging.getLogger(__name__).warning(str(error), location=node)
        raise nodes.SkipNode

    inline, block = (partial(write, display=display) for display in ("inline", "block"))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))


def fold_solutions(notebook: nbformat.NotebookNode) -> None:
    """Put each solution, from its cell `# 1. ...` to the next, into a fold."""
    cells, number = [], None
    for cell in notebook.cells:
        is_solution = "solution" in cell.metadata.get("tags", [])
        begins = is_solution and re.match(r"# (\d+)\.", cell.source)
        if number and (begins or not is_solution):
            cells.append(v4.new_markdown_cell("</details>"))
            number = None
        if begins:
            number = begins[1]
            fold = f'<details class="solution"><summary>Solution {number}</summary>'
            cells.append(v4.new_markdown_cell(fold))
        cells.append(cell)
    notebook.cells = cells


def stage(source: Path) -> None:
    """Copy what the pages are made from into the folder `source`, as Sphinx wants it."""
    for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            notebook = nbformat.read(path, as_version=4)
            fold_solutions(notebook)
            nbformat.write(notebook, copy)
        else:
            shutil.copy(path, copy)
        if path.suffix in (".ipynb", ".md"):  # the README is the first page
            text = re.sub(r"\]\(((?:\.\./)*)README\.md", r"](\1index.md", copy.read_text())
            copy.write_text(text)
    pages = "\n".join(name.removesuffix(".md") for name in PAGES)
    index = (source / "README.md").rename(source / "index.md")
    index.write_text(index.read_text() + CONTENTS.format(pages=pages))


def main(target: Path = ROOT / "outputs" / "site") -> None:
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source, static = Path(folder) / "source", Path(folder) / "static"
        static.mkdir()
        (static / "course.css").write_text(STYLE)
        stage(source)
        settings = SETTINGS | {"html_static_path": [str(static)]}
        app = Sphinx(
            source, None, target, Path(folder) / "doctrees", "html", settings, status=None, warningiserror=True
        )
        app.build()
        if app.statuscode:
            raise SystemExit(app.statuscode)
    for left in (".buildinfo", "objects.inv"):  # for other programs
        (target / left).unlink()
    print(f"{target / 'index.html'}: to be opened in a browser")


if __name__ == "__main__":
    main()
