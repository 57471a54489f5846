"""Without a patch training goes on by the libraries' own way, with the same losses. A process for each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqdm
import unsloth
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.patches import PATCHES

pytestmark = pytest.mark.slow

# What takes each private name away, before helpers is imported. Those of "FOLDER" are in files of `changed_files`.
RENAME = """
def rename(cls, old, new):
    for name, function in list(vars(cls).items()):
        code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
        if code is not None and old in code.co_names:
            names = tuple(new if one == old else one for one in code.co_names)
            getattr(function, "__wrapped__", function).__code__ = code.replace(co_names=names)
        if name == old:
            setattr(cls, new, function)
            delattr(cls, old)

import trl.trainer.dpo_trainer
"""
OTHER_SOURCE = "unsloth.__file__ = FOLDER + '/unsloth/__init__.py'"
TAKE_AWAY = {
    "text_progress": "",  # by PYTHONPATH
    "quiet": "import logging, torch.utils._pytree as tree\ntree.log = logging.getLogger('torch.elsewhere')",
    "fused_lm_head": "import trl.trainer.dpo_trainer, trl.trainer.utils\ndel trl.trainer.utils.add_fused_lm_head",
    "shared_prompt": """
from transformers.models.llama import modeling_llama
causal = modeling_llama.create_causal_mask
def own_mask_only(attention_mask=None, **given):
    plain = attention_mask is None or attention_mask.ndim == 2
    return causal(attention_mask=attention_mask if plain else None, **given)
modeling_llama.create_causal_mask = own_mask_only
""",
    "prompt_segments": OTHER_SOURCE,
    "recorded_stack": "import torch\ndel torch.cuda.graph_pool_handle",
    "one_update": "import bitsandbytes.optim.optimizer as module\ndel module.sync_gpu",
    "cast_once": "import torch\ndel torch._foreach_copy_",
    "given_ids": RENAME + "rename(trl.trainer.dpo_trainer.DPOTrainer, '_prepare_dataset', '_tokenize_dataset')",
    "cached_reference": RENAME + "rename(trl.trainer.dpo_trainer.DPOTrainer, 'precompute_ref_logps', 'ref_in_data')",
    "unsloth_checkpointing": OTHER_SOURCE,
    "llama_cpp": "import unsloth_zoo.llama_cpp\ndel unsloth_zoo.llama_cpp.LLAMA_CPP_DEFAULT_DIR",
    "dataset_key": """
import datasets
table = datasets.Dataset
table._fingerprint = property(lambda self: (vars(self)["_name"],), lambda self, name: vars(self).update(_name=name))
""",
}

# Three steps in fp32; the last line is the losses. A patch that a CPU has no use for is asked for at the end.
TRAIN = """
import json
import helpers
from helpers.patches import works
model, tokenizer = helpers.load_model(FOLDER + "/model")
pairs = helpers.load_pairs().select(range(10))
run = helpers.train_dpo(
    helpers.add_lora(model).float(), tokenizer, pairs.select(range(6)), pairs.select(range(6, 10)), RUN,
    max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_steps=0,
    bf16=False, logging_steps=1,
)
assert NAME is None or not works(NAME)
print("LOSSES", json.dumps([row["loss"] for row in run.history if "loss" in row]))
"""


def changed_files(folder: Path) -> None:
    """Copies of tqdm and of parts of Unsloth in which private names are others."""
    shutil.copytree(Path(tqdm.__file__).parent, folder / "path" / "tqdm", ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / "path" / "tqdm"
    (changed / "autonotebook.py").rename(changed / "_chosen.py")
    auto = changed / "auto.py"
    auto.write_text(auto.read_text().replace(".autonotebook", "._chosen"))
    for name in ("models/llama.py", "models/rl.py", "utils/attention_dispatch.py"):
        source = (Path(unsloth.__file__).parent / name).read_text(encoding="utf-8")
        for old in ("model._unsloth_gradient_checkpointing", "prefix_seg_info"):
            source = source.replace(old, "another_name")
        (folder / "unsloth" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "unsloth" / name).write_text(source, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with a tiny random model and the changed files."""
    folder = tmp_path_factory.mktemp("without")
    changed_files(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def train(folder: Path, name: str | None, take_away: str = "") -> tuple[list[float], str]:
    """The losses of three steps without the patch `name`, and what was printed."""
    names = f"FOLDER, RUN, NAME = {str(folder)!r}, {str(folder / f'run of {name}')!r}, {name!r}\n"
    paths = [str(folder / "path")] if name == "text_progress" else []
    source = "\n".join([names, "import unsloth" if take_away else "", take_away, TRAIN])
    result = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(Path.cwd())])},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("LOSSES")
    return json.loads(last.removeprefix("LOSSES")), result.stdout


@pytest.fixture(scope="module")
def losses(folder):
    """With every patch."""
    losses, text = train(folder, None)
    assert "left out" not in text
    assert len(losses) == 3 and abs(losses[0] - losses[2]) > 0.01  # something is learned
    return losses


@pytest.mark.parametrize("name", PATCHES)
def test_training_goes_on_with_the_same_losses(name, folder, losses):
    found, text = train(folder, name, TAKE_AWAY[name])
    lines = [line for line in text.splitlines() if line.startswith(f"Patch {name} is left out (")]
    assert len(lines) == 1 and lines[0].endswith(PATCHES[name])
    assert found == pytest.approx(losses, abs=1e-4)


def test_helpers_can_be_imported_without_any_of_them(folder):
    every = "\n".join(TAKE_AWAY.values())
    names = f"FOLDER = {str(folder)!r}\nimport unsloth\n"
    source = (
        f"{names}{every}\nfrom helpers.patches.__main__ import show_state\nraise SystemExit(0 if show_state() else 1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "path"), str(Path.cwd())])},
    )
    assert result.returncode == 1, result.stderr[-3000:]
    states = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.split(maxsplit=1)[0] in PATCHES)
    assert list(states) == list(PATCHES)
    assert all(state.startswith("broken (") for state in states.values()), states


def test_state_of_all_on_the_command_line():
    command = [sys.executable, "-m", "helpers.patches"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.count(" works\n") == len(PATCHES), result.stdout
