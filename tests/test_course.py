"""The copies for learners have the exercises and no answers; the pages of the course are whole and need no network."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

from tests.test_jupyterlab import need_chromium, opened_tab, wait_for
from tools import pages, student

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = [*sorted(FOLDER.glob("*.ipynb")), *sorted((FOLDER / "extra").glob("*.ipynb"))]
OTHERS = sorted(["index.html", *(f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md"))])
LESSONS = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in NOTEBOOKS]
PAGES = [*OTHERS, *LESSONS]
TEX = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("name", PAGES)


def is_solution(cell) -> bool:
    return "solution" in cell.metadata.get("tags", [])


def exercises(notebook) -> list[str]:
    """The numbered lines between the headings Exercises and Solutions (or the end)."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    part = text.split("## Exercises\n")[1].split("## Solutions")[0]
    return re.findall(r"^\d+\. .+$", part, re.MULTILINE)


@each_notebook
def test_each_exercise_has_a_tagged_solution(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(place for place, cell in enumerate(cells) if cell.source == "## Solutions")
    assert [is_solution(cell) for cell in cells] == [first <= place < len(cells) - 2 for place in range(len(cells))]
    solved = [found[1] for cell in cells if is_solution(cell) and (found := re.match(r"# (\d+)\. ", cell.source))]
    asked = [exercise.split(".")[0] for exercise in exercises(nbformat.read(path, as_version=4))]
    assert solved == asked == [str(number) for number in range(1, len(asked) + 1)] and len(asked) >= 3


@each_notebook
def test_exercises_say_what_they_ask_how_hard_they_are_and_how_long_they_take(path):
    asked = exercises(nbformat.read(path, as_version=4))
    heads = [re.match(r"\d+\. \(([a-zA-Z ]+); (?:easy|medium|hard), \d+ minutes[^)]*\.\) ", one) for one in asked]
    assert all(heads)
    assert {word for head in heads for word in head[1].lower().split(" and ")} == {"compute", "explain", "build"}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.main(folder)
    return folder


@each_notebook
def test_a_copy_for_learners_has_no_outputs_and_no_solutions(copies, path):
    source = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    copy = nbformat.read(copies / path.relative_to(FOLDER), as_version=nbformat.NO_CONVERT)
    nbformat.validate(copy)
    assert (copy.nbformat, copy.nbformat_minor) == (source.nbformat, source.nbformat_minor)
    assert [(cell.id, cell.source) for cell in copy.cells] == [
        (cell.id, cell.source) for cell in source.cells if not is_solution(cell)
    ]
    code = [cell for cell in copy.cells if cell.cell_type == "code"]
    assert {(len(cell.outputs), cell.execution_count) for cell in code} == {(0, None)}
    assert set(copy.metadata) == {"kernelspec", "language_info"}
    text = nbformat.writes(copy)
    assert "Solutions" not in text
    for cell in filter(is_solution, source.cells):
        assert nbformat.writes(nbformat.v4.new_notebook(cells=[cell])) not in text and cell.source not in text
    assert exercises(copy) == exercises(source)


def test_a_formula_stays_text_of_the_page():
    assert "<script" not in pages.mathml(r"a < b \text{<script>}", "block")
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in pages.mathml(r"\frac12", "inline")
    with pytest.raises(ValueError, match=r"\\unheard in"):
        pages.mathml(r"\unheard{x}", "inline")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, and each page parsed."""
    folder = tmp_path_factory.mktemp("site")
    pages.main(folder)
    made = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}
    return folder, {name: BeautifulSoup(path.read_text(), "html.parser") for name, path in made.items()}


def lesson(site, path: Path) -> BeautifulSoup:
    """The page of a notebook."""
    return site[1][path.relative_to(ROOT).with_suffix(".html").as_posix()]


# Slow: the fixture takes ten seconds.
@pytest.mark.slow
def test_every_notebook_and_doc_has_a_page(site):
    assert set(PAGES) <= set(site[1])
    for name in PAGES:
        assert len(site[1][name].find_all("h1")) >= 1, name


@pytest.mark.slow
def test_next_leads_through_the_course_in_its_order(site):
    names, name = [], "index.html"
    while name:
        names.append(name)
        following = site[1][name].select_one("a.next-page")
        name = following and (site[0] / name).parent.joinpath(following["href"]).resolve().relative_to(site[0])
        name = name and name.as_posix()
    assert names[: len(NOTEBOOKS) + 1] == ["index.html", *LESSONS]
    assert set(PAGES) <= set(names)


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site):
    folder, parsed = site
    for name, page in parsed.items():
        sources = [tag.get("src") or tag.get("data") for tag in page.select("[src], object[data]")]
        sources += [tag["href"] for tag in page.select("link[href]")]
        styles = " ".join([*(tag.text for tag in page("style")), *(tag["style"] for tag in page.select("[style]"))])
        assert [source for source in sources if re.match(r"\w+:|//", source) and not source.startswith("data:")] == []
        assert not re.search(r"@import|url\(", styles), name
        for source in sources:
            if not source.startswith(("data:", "#")):
                assert (folder / name).parent.joinpath(unquote(urlsplit(source).path)).is_file(), (name, source)
    for path in folder.rglob("*.css"):
        style = path.read_text()
        used = re.findall(r"@import.*|url\([\s\"']*([^)]{0,40})", style)
        assert [address for address in used if not address.startswith("data:")] == [], path


@pytest.mark.slow
def test_every_local_link_leads_somewhere(site):
    folder, parsed = site
    checked = 0
    for name, page in parsed.items():
        for link in page.select("a[href]"):
            address = urlsplit(link["href"])
            if address.scheme in ("http", "https"):
                continue
            target = (folder / name).parent.joinpath(unquote(address.path)).resolve() if address.path else folder / name
            assert target.is_file(), (name, link["href"])
            assert target.suffix not in (".ipynb", ".md"), (name, link["href"])
            if address.fragment:
                other = parsed[target.relative_to(folder).as_posix()]
                assert other.find(id=unquote(address.fragment)), (name, link["href"])
            checked += 1
    assert checked > 500  # contents, previous and next, and the links in the text
    hand_over = parsed["notebooks/extra/hand_over.html"]
    assert hand_over.select('a[href="../../index.html#when-one-machine-is-too-small"]')


@pytest.mark.slow
@each_notebook
def test_solutions_are_folded(site, path):
    notebook = nbformat.read(path, as_version=4)
    page = BeautifulSoup(str(lesson(site, path)), "html.parser")
    folds = page.select("details.solution")
    count = len(exercises(notebook))
    assert [fold.summary.text for fold in folds] == [f"Solution {number}" for number in range(1, count + 1)]
    assert not any(fold.has_attr("open") for fold in folds)
    texts = [plain(fold.extract().text) for fold in folds]
    rest = plain(page.select_one("article").text)
    number = -1
    for cell in filter(is_solution, notebook.cells):
        number += bool(re.match(r"# \d+\. ", cell.source))
        begin = plain(re.split(r"[`*$\[\n]", cell.source)[0])  # up to the first mark
        if number >= 0:
            assert begin in texts[number] and begin not in rest, begin
    assert "shut_down_kernel()" in rest and rest.count("Solutions") == 1


def plain(text: str) -> str:
    """Without white space and with straight quotes: Sphinx bends them."""
    text = re.sub(r"\s", "", text).replace("…", "...")
    return text.translate(str.maketrans("“”‘’–", "\"\"''-"))


@pytest.mark.slow
@each_notebook
def test_outputs_are_on_the_page_as_text(site, path):
    page = lesson(site, path)
    text = plain(page.select_one("article").text)
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                assert plain(output.text) in text, cell.id
            elif "image/png" not in output.data and "text/html" not in output.data:
                assert plain(output.data["text/plain"]) in text, cell.id
    assert {tag.name for tag in page.body("article")[0].find_all(True)} <= set(
        "div section p a span h1 h2 h3 h4 pre code em strong ol ul li table thead tbody tr th td style img blockquote "
        "details summary svg use hr br b label colgroup col figure input button "
        "math mrow mi mo mn msub msup msubsup mfrac mtext mspace mover munder msqrt mstyle".split()
    )


@pytest.mark.slow
@each_page
def test_formulas_are_mathematics(site, name):
    page = BeautifulSoup(str(site[1][name]), "html.parser")
    shown = page("math")
    source = (ROOT / name).with_suffix(".ipynb")
    if source.is_file():
        cells = nbformat.read(source, as_version=4).cells
        prose = [re.sub(r"`[^`\n]*`", "", cell.source) for cell in cells if cell.cell_type == "markdown"]
        assert len(shown) == sum(len(TEX.findall(text)) for text in prose)
    for code in page.select("pre, code, .cell_output"):
        code.extract()
    assert "$" not in page.select_one("article").text


@pytest.fixture(scope="module")
def tab(site, tmp_path_factory):
    need_chromium()
    with opened_tab(tmp_path_factory.mktemp("chromium")) as tab:
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        yield tab


def opened(tab, path: Path, width: int) -> list[dict]:
    """Show a page in a window of this width; the events that it caused."""
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.events.clear()
    tab.call("Page.navigate", url=path.as_uri())
    script = f"return document.readyState === 'complete' && location.href === '{path.as_uri()}'"
    wait_for(lambda: tab.run(script), 30, f"{path.name} is there")
    return tab.events


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 400])
@each_page
def test_a_browser_without_a_network_shows_the_page(site, tab, name, width):
    events = opened(tab, site[0] / name, width)
    flat = "Array.from(document.querySelectorAll('math')).filter(m => !m.closest('details'))"
    sizes = tab.run(f"return {flat}.map(m => m.getBoundingClientRect()).map(r => [r.width, r.height])")
    assert all(wide > 3 and high > 5 for wide, high in sizes), sizes
    assert sizes or name != "notebooks/03_train.html"
    assert "$$" not in tab.run("return document.querySelector('article').innerText")
    assert tab.run("return document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves

    for number in range(tab.run("return document.querySelectorAll('details.solution').length")):
        tab.run(f"window.fold = document.querySelectorAll('details.solution')[{number}]")
        tab.run("window.inside = fold.children[1]; fold.scrollIntoView({behavior: 'instant', block: 'center'})")
        assert tab.run("return inside.checkVisibility()") is False
        box = tab.run("return JSON.parse(JSON.stringify(fold.firstElementChild.getBoundingClientRect()))")
        place = {"x": box["x"] + 20, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            tab.call("Input.dispatchMouseEvent", type=kind, **place)
        assert tab.run("return inside.checkVisibility() && inside.getBoundingClientRect().height > 10"), number

    requests = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert requests and [url for url in requests if not url.startswith(("file:", "data:"))] == []
    bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    assert [event for event in events if event["method"] in bad] == []
