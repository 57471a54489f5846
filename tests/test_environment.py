"""The three lists of packages agree, the lock can be installed by anybody, and the wheel has all files."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tools import hosted

ROOT = Path(__file__).parent.parent
DESIGN = "jupyterlab ipykernel unsloth trl datasets torch bitsandbytes python-dotenv matplotlib nbmake".split()


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text()
    return dict(re.findall(r"^([a-z0-9_.-]+)==([^ \\]+)", text, flags=re.M))


def test_conda_environment_agrees_with_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    pins = dict(entry.split("==") for entry in pip)
    assert sorted(pins) == sorted(DESIGN)
    assert pins == {name: locked()[name] for name in pins}


def test_lock_is_hash_pinned_and_names_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "index-url" not in text
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert len(entries) > 100
    without_hash = [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry]
    assert without_hash == []


def test_every_direct_requirement_is_in_the_lock():
    lines = (ROOT / "requirements.in").read_text().splitlines()
    asked = [re.split("[=<> ]", line)[0] for line in lines if line and not line.startswith("#")]
    assert [name for name in asked if name not in locked()] == []


def test_env_example_documents_every_setting():
    code = "".join(path.read_text() for path in (ROOT / "helpers").rglob("*.py"))
    used = set(re.findall(r'setting\(\s*"([A-Z_]+)"', code)) | set(re.findall(r'"(DPO_[A-Z_]+)"', code))
    documented = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), flags=re.M))
    assert used == documented


def test_wheel_has_every_module_and_data_file(tmp_path):
    """Built from a copy, so that no build/ or egg-info of an earlier build adds to it."""
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "helpers").rglob("*") if path.is_file()}
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {"helpers/train/dpo.py", "helpers/data/bundled/pairs.jsonl"} <= files
    assert files - packed == set()


def test_the_devcontainer_names_commands_that_exist():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
    container = json.loads(text)  # plain JSON, though comments would be allowed
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = re.findall(r"\bmake ([a-z]+)", text)
    assert container["postCreateCommand"] == "make setup" and set(named) == {"setup", "lab"} <= targets
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][0]
    assert f":{conda.split('=')[1]}-" in container["image"]
    assert container["forwardPorts"] == [8888]  # Jupyter's own default
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter.endswith("/.venv/bin/python")


def test_the_hosted_way_installs_what_the_helpers_import():
    roots = set()
    for path in (ROOT / "helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            roots |= {name.split(".")[0] for name in names}
    ours = {"helpers", "IPython", "jupyter_server", ""}  # a notebook's kernel has these
    packages = {"dotenv": "python-dotenv", "yaml": "pyyaml", "unsloth_zoo": "unsloth-zoo"}
    needed = {packages.get(root, root) for root in roots - set(sys.stdlib_module_names) - ours}
    come_along = {"filelock", "huggingface_hub", "jinja2", "requests", "tqdm", "xxhash"}  # torch and datasets need them
    assert needed - set(hosted.PINNED) - set(hosted.ANY) - set(hosted.KEPT) <= come_along
    assert [hosted.locked(name) for name in hosted.PINNED] == [f"{name}=={locked()[name]}" for name in hosted.PINNED]


def test_the_hosted_way_stops_without_a_torch(monkeypatch):
    monkeypatch.setattr(hosted, "there", lambda: {"uv": "uv==1"})
    monkeypatch.setattr(hosted, "uv", lambda *_: pytest.fail("it installs something"))
    with pytest.raises(SystemExit, match="no torch"):
        hosted.main()


def test_the_cell_for_hosted_notebooks_runs_a_program_that_is_there():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (cell,) = re.findall(r"^    !git clone .*\n(?:    .*\n)+", page, flags=re.M)
    assert (ROOT / re.search(r"%run (\S+)", cell)[1]).is_file()
