"""The three lists of packages agree, the lock can be installed by anybody, and the wheel has all files."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

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
