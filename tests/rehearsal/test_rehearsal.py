"""The rehearsal: the notebooks as a reader with a GPU, a hybrid model and pairs of their own finds them.

The model has Qwen3's shape, tokenizer and chat template, two small layers and random weights. Without a GPU it is
trained on the CPU with the settings of the profile `gpu`. Run by itself, with the prints: pytest tests/rehearsal -s
"""

import json
import re
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
import yaml
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from helpers.data.check import check_pairs
from helpers.data.load import BUNDLED_PAIRS, load_pairs
from helpers.data.render import prompt_ids
from helpers.data.split import split_pairs
from helpers.run.folder import Run, read_info
from helpers.train import TABLE
from helpers.train.sweep import Sweep

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXTRA = sorted((ROOT / "notebooks" / "extra").glob("*.ipynb"))
EXTRA = [path for path in EXTRA if path.stem != "on_policy"]  # it takes the embedded model, whatever the reader's is
NO_MODEL = ("02_data", "other_losses", "losses_measured")
PAIRS, HELD_OUT = 60, 12
GPU_RATE = TABLE["start"]["gpu"]["learning_rate"]
OF_THE_EMBEDDED = re.compile("SmolLM|135M", re.IGNORECASE)  # nothing that is said of another model names it
OPENING, NO_THOUGHT = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"

# Runs before the first cell of a notebook, in its kernel. A CPU trains with the settings of the profile `gpu`, but for
# the optimizer, which needs one. Replies are cut early: a random model ends none. Of each sequence that goes into a
# model, what follows the mark that opens the assistant's turn is kept in a file.
BEFORE = """
import functools, json, pathlib
import helpers.train
from unsloth import FastLanguageModel

start = helpers.train.TABLE["start"]
start["cpu"] |= {{name: value for name, value in start["gpu"].items() if name != "optim"}}
seen, opening, original = set(), {opening}, FastLanguageModel.from_pretrained


def look(module, given, named):
    before = len(seen)
    for row in (given[0] if given else named["input"]).tolist():
        ends = [i for i in range(len(opening), len(row) + 1) if row[i - len(opening) : i] == opening]
        seen.update(tuple(row[i : i + 4]) for i in ends)
    if len(seen) > before:
        pathlib.Path({seen!r}).write_text(json.dumps(sorted(seen)))


def loaded(*given, **named):
    model, tokenizer = original(*given, **named)
    model.get_input_embeddings().register_forward_pre_hook(look, with_kwargs=True)
    generate = model.generate

    @functools.wraps(generate)  # Unsloth knows its own by the name
    def short(*given, **more):
        return generate(*given, **more | {{"max_new_tokens": min(more["max_new_tokens"], 12)}})

    model.generate = short
    return model, tokenizer


FastLanguageModel.from_pretrained = loaded
"""
# In 04 and 05 besides: fewer of the pairs that 04 brings, and fewer sampled replies.
FEWER = """
import helpers

sweep_all = helpers.sweep_beta
helpers.sweep_beta = lambda *given, **options: sweep_all(*given, **options | {{"prompts": 6}})
train_all, few = helpers.train_dpo, lambda data, most: data.select(range(min(most, len(data))))
helpers.train_dpo = lambda model, tokenizer, train, test, *more, **options: train_all(
    model, tokenizer, few(train, {train}), few(test, {test}), *more, **options
)
"""


def tiny(folder: Path, tokenizer) -> Path:
    """The folder of a tiny model in Qwen3's shape, with the `tokenizer`."""
    sizes = {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **tokens, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_own_pairs(file: Path, thought: str = "") -> None:
    """Comparisons as an arena publishes them: no topics, no flaws, and the winner by its letter. The answers are cut
    after eight words, since a vocabulary as large as Qwen3's makes each token dear. `thought` is put before them."""
    rows = [json.loads(line) for line in BUNDLED_PAIRS.read_text(encoding="utf-8").splitlines()]
    cut = [(row["prompt"], *(" ".join(row[side].split()[:8]) for side in ("chosen", "rejected"))) for row in rows]
    cut = [(row[0], thought + row[1], thought + row[2]) for row in cut if row[1] != row[2]]
    names = ("question", "response_a", "response_b", "winner")
    with file.open("w", encoding="utf-8") as out:
        for number, (prompt, *sides) in enumerate(cut[:: len(cut) // PAIRS][:PAIRS]):
            ordered = sides[:: -1 if number % 2 else 1]
            out.write(json.dumps(dict(zip(names, (prompt, *ordered, "ab"[number % 2]), strict=True))) + "\n")


class Reader:
    """Someone's settings and folders."""

    def __init__(self, folder: Path, tokenizer, thought: str = ""):
        self.folder, self.out = folder, folder / "out"
        self.model = tiny(folder / "tiny-qwen3", tokenizer)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        write_own_pairs(folder / "mine.jsonl", thought)
        self.settings = {"DPO_MODEL": self.model, "DPO_THINKING_MODEL": self.model, "DPO_DATA": folder / "mine.jsonl"}
        self.settings |= {"DPO_OUTPUT_DIR": self.out, "DPO_CACHE_DIR": folder / "cache"}

    def execute(self, path: Path, monkeypatch) -> str:
        """What the cells of a notebook, as they are, print; an error of a cell is raised."""
        for name, value in self.settings.items():
            monkeypatch.setenv(name, str(value))
        notebook = nbformat.read(path, as_version=4)
        opening = self.tokenizer.encode(OPENING, add_special_tokens=False)
        cell = BEFORE.format(opening=opening, seen=str(self.folder / f"{path.stem}.json"))
        if path.stem[:2] in ("04", "05"):
            cell += FEWER.format(train=PAIRS - HELD_OUT, test=HELD_OUT)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(cell))
        here, began = {"metadata": {"path": str(path.parent)}}, time.monotonic()
        try:
            nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute()
        finally:
            nbformat.write(notebook, self.folder / path.name)
            print(f"{path.stem}: {time.monotonic() - began:.0f} s; {self.folder / path.name}")
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return "".join(str(one.get("text", "")) + str(one.get("data", {}).get("text/plain", "")) for one in outputs)

    def after_the_opening(self, path: Path) -> set[str]:
        """What followed the assistant's mark in all that went into the models of a notebook."""
        return {self.tokenizer.decode(ids) for ids in json.loads((self.folder / f"{path.stem}.json").read_text())}


@pytest.fixture(scope="module")
def reader(qwen3, tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("reader"), qwen3)


@pytest.mark.parametrize("path", COURSE + EXTRA, ids=lambda path: path.stem)
def test_no_cell_fails_and_no_model_is_asked_otherwise_than_trained(reader, path, monkeypatch):
    printed = reader.execute(path, monkeypatch)
    assert printed and not OF_THE_EMBEDDED.search(printed)
    if path.stem.startswith("04"):  # thoughts, so thinking is on: a reply begins before its thought
        texts = reader.after_the_opening(path)
        assert "" in texts and all(text.startswith("<think>") for text in texts - {""})
    elif path.stem not in NO_MODEL:
        assert reader.after_the_opening(path) == {NO_THOUGHT}


def left_by(notebook: str, reader: Reader) -> Path:
    """The folder of the runs, if the `notebook` was executed before."""
    if not (reader.folder / f"{notebook}.ipynb").exists():
        pytest.skip(f"{notebook} was not executed in this session")
    return reader.out / "runs"


def test_all_pairs_were_used_at_the_rate_of_the_profile(reader):
    left_by("05_beta_sweep", reader)
    run, sweep = Run.load(left_by("03_train", reader) / "03_train"), Sweep.load(reader.out / "beta_sweep")
    runs = [run.info, *(read_info(sweep.run_folder(row.beta, 0)) for row in sweep.finished.itertuples())]
    assert len(runs) == 5
    for info in runs:
        assert (info.train_pairs, info.test_pairs) == (PAIRS - HELD_OUT, HELD_OUT)
        assert info.steps == 6
        assert info.template == {"enable_thinking": False}
        assert info.config["learning_rate"] == GPU_RATE
    for name in ("04_naive", "04_thinking"):
        assert read_info(left_by("04_thinking_pairs", reader) / name).config["learning_rate"] == GPU_RATE


def test_what_goes_to_the_next_person_has_all_pairs_and_the_rate(reader):
    left_by("hand_over", reader)
    handed = reader.out / "export" / "torchrun"
    assert yaml.safe_load((handed / "settings.yaml").read_text())["learning_rate"] == GPU_RATE
    lines = {name: len((handed / "data" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")}
    assert lines == {"train": PAIRS - HELD_OUT, "test": HELD_OUT}


@pytest.mark.parametrize(
    "notebook, name, times", [("01_setup", "01_first", 5), ("when_training_goes_wrong", "03_sick", 15)]
)
def test_a_rate_that_is_larger_on_purpose_follows_the_profile(reader, notebook, name, times):
    info = read_info(left_by(notebook, reader) / name)
    assert info.config["learning_rate"] == pytest.approx(times * GPU_RATE)


def test_the_prompt_of_a_reply_begins_what_was_trained(reader):
    run, tokenizer = Run.load(left_by("03_train", reader) / "03_train"), reader.tokenizer
    parts = split_pairs(load_pairs(reader.folder / "mine.jsonl"))
    report = check_pairs(parts["train"], tokenizer)
    assert report.hash == run.info.data.train and report.findings == []
    asked = prompt_ids(tokenizer, parts["train"]["prompt"], **run.info.template)
    assert asked == report.ids["prompt_ids"][:]
    for row, messages in zip(report.ids, report.pairs, strict=True):
        text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
        assert text.count("<think>") == 1 and text.endswith(f"{messages['chosen'][0]['content']}<|im_end|>\n")


@pytest.fixture(scope="module")
def thinker(thinking_2507, tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("thinker"), thinking_2507)


def test_a_model_that_always_thinks_is_told_what_to_do_with_pairs_without_thoughts(thinker, monkeypatch):
    (path,) = (path for path in COURSE if path.stem.startswith("02"))
    printed = thinker.execute(path, monkeypatch)
    assert "thought_missing" in printed and "write a thought into both answers" in printed


@pytest.fixture(scope="module")
def thoughtful(thinking_2507, tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("thoughtful"), thinking_2507, "<think>\nA plain case.\n</think>\n\n")


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_model_that_always_thinks_goes_through_the_course(thoughtful, path, monkeypatch):
    """With a reader whose own pairs have thoughts: a reply begins within the thought, as what was trained does."""
    printed = thoughtful.execute(path, monkeypatch)
    assert printed and not OF_THE_EMBEDDED.search(printed)
    if path.stem not in NO_MODEL:
        after = thoughtful.after_the_opening(path)
        assert after and all(text.startswith("<think>\n") for text in after)


def test_what_a_model_that_always_thinks_was_trained_on(thoughtful):
    runs = left_by("03_train", thoughtful)
    tokenizer, run = thoughtful.tokenizer, Run.load(runs / "03_train")
    assert (run.info.train_pairs, run.info.test_pairs) == (PAIRS - HELD_OUT, HELD_OUT)
    assert run.info.config["learning_rate"] == GPU_RATE
    train = split_pairs(load_pairs(thoughtful.folder / "mine.jsonl"))["train"]
    report = check_pairs(train, tokenizer)
    assert report.hash == run.info.data.train
    assert prompt_ids(tokenizer, train["prompt"], **run.info.template) == report.ids["prompt_ids"][:]
    for row in report.ids:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n<think>\n")
        assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]).count("<think>") == 1
    info = read_info(left_by("04_thinking_pairs", thoughtful) / "04_thinking")
    assert info.config["learning_rate"] == GPU_RATE and info.status == "finished"
