"""Notebooks in a real JupyterLab and a real browser: all cells run, progress is text, the kernel ends without a dialog.

The browser is driven by its DevTools protocol. Screenshots go to outputs/jupyterlab. The pairs are few, in a file of
the reader's own, so that 03 trains in a minute; on the bundled ones the notebooks are run by nbmake.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import websocket

from helpers.data.load import BUNDLED_PAIRS

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "outputs" / "jupyterlab"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAIRS = 60  # a fifth is held out: 6 steps of 8 pairs
pytestmark = pytest.mark.slow


def wait_for(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.3)
    raise AssertionError(f"after {seconds} s still waiting: {what}")


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Page:
    """One tab of Chromium."""

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.numbers = count(1)
        self.events = []

    def call(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message["error"]
        return message["result"]

    def run(self, script: str):
        """The value that the body of an asynchronous JavaScript function returns."""
        expression = f"(async () => {{ {script} }})()"
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        (PICTURES / f"{name}.png").write_bytes(base64.b64decode(data))


class Lab:
    """A JupyterLab over copies of the notebooks, with settings and outputs of its own."""

    def __init__(self, folder: Path):
        shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
        own = pd.read_json(BUNDLED_PAIRS, lines=True, nrows=PAIRS)[["prompt", "chosen", "rejected"]]
        own.to_json(folder / "my_pairs.jsonl", orient="records", lines=True)
        quiet = folder / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no question, no request to the outside
        environment = os.environ | {
            "DPO_DATA": str(folder / "my_pairs.jsonl"),
            "DPO_OUTPUT_DIR": str(folder / "outputs"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        }
        options = ("--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--LabApp.expose_app_in_browser=True")
        with (folder / "server.log").open("w") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=environment, stdout=log, stderr=log
            )
        runtime = folder / "runtime"
        self.folder = folder
        try:
            path = wait_for(lambda: next(runtime.glob("jpserver-*.json"), None), 90, "JupyterLab starts")
            self.info = wait_for(lambda: json.loads(path.read_text() or "null"), 10, "the server's address")
            wait_for(lambda: self.get("api/status"), 30, "JupyterLab answers")
        except BaseException:
            end(self.server)
            raise

    def get(self, path: str):
        request = urllib.request.Request(
            self.info["url"] + path, headers={"Authorization": f"token {self.info['token']}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            return None


def need_chromium() -> None:
    if CHROMIUM is None:
        reason = "no Chromium here; `make chromium` installs it on Debian"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    need_chromium()
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    end(lab.server)


@contextmanager
def opened_tab(profile: Path):
    """The one tab of a new browser, whose own files go into the folder `profile`."""
    options = (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --hide-scrollbars --remote-debugging-port=0"
    )
    browser = subprocess.Popen(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        port = wait_for(lambda: port_file.exists() and port_file.read_text().split("\n")[0], 60, "Chromium starts")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as reply:
            tabs = json.load(reply)
        page = Page(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
        page.call("Emulation.setDeviceMetricsOverride", width=1300, height=1600, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab's commands mean the focused notebook
        yield page
        page.socket.close()
    finally:
        end(browser)


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    with opened_tab(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def open_notebook(page: Page, lab: Lab, name: str) -> None:
    """Load JupyterLab with this notebook and wait for its kernel; every dialog is noted."""
    page.call("Page.navigate", url=f"{lab.info['url']}lab/workspaces/{name}?token={lab.info['token']}")
    wait_for(lambda: page.run("return window.jupyterapp?.started.then(() => true)"), 60, "the page is there")
    page.run("""window.dialogs = [];
        new MutationObserver(changes => changes.forEach(change => change.addedNodes.forEach(node => {
            if (node.matches?.('.jp-Dialog')) window.dialogs.push(node.innerText);
        }))).observe(document.body, {childList: true, subtree: true});""")
    page.run(f"""const app = window.jupyterapp; await app.restored;
        window.panel = await app.commands.execute('docmanager:open', {{path: 'notebooks/{name}.ipynb'}});
        app.shell.activateById(panel.id);""")
    ready = "return panel.sessionContext.isReady && panel.sessionContext.session?.kernel?.status === 'idle'"
    wait_for(lambda: page.run(ready), 60, f"the kernel of {name} is idle")


def cells_on_page(page: Page) -> list:
    """The code cells of the notebook's model in the page, which hold their outputs."""
    model = page.run("return JSON.stringify(panel.content.model.toJSON())")
    return [cell for cell in nbformat.from_dict(json.loads(model)).cells if cell.cell_type == "code"]


# Seconds that a notebook may take on two cores, with room for a slow machine.
SECONDS = {"01_setup": 300, "02_data": 180, "03_train": 480}


@pytest.mark.parametrize("name", SECONDS)
def test_runs_in_jupyterlab(lab, page, name):
    open_notebook(page, lab, name)
    page.run(
        "await window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs');"
        "window.jupyterapp.commands.execute('notebook:run-all-cells');"  # not awaited: the kernel ends in between
    )

    def finished():
        cells = cells_on_page(page)
        failed = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert failed == [], failed
        return all(cell.execution_count for cell in cells) and lab.get("api/kernels") == []

    wait_for(finished, SECONDS[name], f"{name} runs to its end and its kernel is gone")
    # The page notices a little later; a dialog, or a kernel started again, would come then.
    wait_for(lambda: page.run("return panel.sessionContext.hasNoKernel"), 60, "the page shows no kernel")
    time.sleep(3)
    page.picture(f"{name}-end")
    assert page.run("return window.dialogs") == []
    assert lab.get("api/kernels") == []
    assert lab.get("api/sessions") == []

    page.run("await window.jupyterapp.commands.execute('docmanager:save')")
    saved = nbformat.read(lab.folder / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "widgets" not in saved.metadata
    mimes = {mime for output in outputs for mime in output.get("data", {})}
    assert not any("widget" in mime for mime in mimes), mimes
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "kernel shuts down now" in text and "Warning:" not in text
    if name == "03_train":
        assert "step    1 of 6" in text and "held out at step 6" in text  # progress, as lines
    plots = [place for place, cell in enumerate(saved.cells) if re.search(r"^plot_\w+\(.*\)\Z", cell.source, re.M)]
    assert len(plots) == {"01_setup": 0, "02_data": 2, "03_train": 3}[name]
    for place in plots:
        pictures = [output.data.get("image/png") for output in saved.cells[place].outputs]
        assert [base64.b64decode(picture)[:4] for picture in pictures] == [b"\x89PNG"]
    for number, place in enumerate(plots[:2]):
        page.run(f"await panel.content.scrollToItem({place}, 'center')")
        time.sleep(1)
        page.picture(f"{name}-figure-{number}")
