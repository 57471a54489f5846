"""Each patch tests itself, notices that its private name is gone, and then leaves the library's own way."""

import contextlib
import functools
import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.optim
import datasets
import pytest
import torch
import tqdm.std
import trl
import trl.trainer.utils
import unsloth
import unsloth_zoo.llama_cpp
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from helpers.patches import (
    PATCHES,
    cast_once,
    dataset_key,
    expect,
    fault,
    fused_lm_head,
    given_ids,
    llama_cpp,
    prompt_segments,
    shared_prompt,
    text_progress,
    unsloth_checkpointing,
    works,
)
from helpers.patches.__main__ import show_state
from helpers.patches.cached_reference import use_cached_reference

PATCHES_FOLDER = Path(text_progress.__file__).parent


@pytest.fixture(autouse=True)
def own_answers():
    """What `works` says in a test is forgotten after it."""
    works.cache_clear()
    yield
    works.cache_clear()


def other_unsloth(monkeypatch, tmp_path, file: str, name: str) -> None:
    """Unsloth's source with another name in one file, for self-tests that read it."""
    real = Path(unsloth.__file__).parent
    for one in {file, "models/llama.py", "models/rl.py", "utils/attention_dispatch.py"}:
        source = (real / one).read_text(encoding="utf-8")
        (tmp_path / one).parent.mkdir(exist_ok=True)
        (tmp_path / one).write_text(source.replace(name, "another_name") if one == file else source, encoding="utf-8")
    monkeypatch.setattr(unsloth, "__file__", str(tmp_path / "__init__.py"))


def other_auto(monkeypatch, tmp_path) -> None:
    """A `tqdm.auto` that takes its class from elsewhere."""
    (tmp_path / "auto.py").write_text("from tqdm.asyncio import tqdm\n")
    find = functools.partial(importlib.util.spec_from_file_location, location=tmp_path / "auto.py")
    monkeypatch.setattr(importlib.util, "find_spec", find)


def without_mask(monkeypatch, tmp_path) -> None:
    """Llama goes on by its own causal mask, whatever mask it is given."""
    real = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **given: real(**given | {"attention_mask": None}))


def renamed(function, old: str, new: str):
    """The function, with another name for what it looks up."""
    code = function.__code__
    function = type(function)(code, function.__globals__, closure=function.__closure__)
    names = tuple(new if name == old else name for name in code.co_names)
    function.__code__ = code.replace(co_names=names)
    return function


def reads_another_attribute(monkeypatch, tmp_path) -> None:
    loss = renamed(vars(trl.DPOTrainer)["_compute_loss"], "precompute_ref_logps", "reference_is_in_the_data")
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", loss)


def no_step_for_data(monkeypatch, tmp_path) -> None:
    for one in trl.DPOTrainer.__mro__:
        if "_prepare_dataset" in getattr(getattr(one.__init__, "__code__", None), "co_names", ()):
            monkeypatch.setattr(one, "__init__", renamed(one.__init__, "_prepare_dataset", "_tokenize_dataset"))


def other_columns(monkeypatch, tmp_path) -> None:
    def set_columns(self):
        self._signature_columns = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"]

    monkeypatch.setattr(trl.DPOTrainer, "_set_signature_columns_if_needed", set_columns)


def same_fingerprint(monkeypatch, tmp_path) -> None:
    same = property(lambda self: "same", lambda self, value: None)
    monkeypatch.setattr(datasets.Dataset, "_fingerprint", same, raising=False)


def other_steps(self, group, weight, *place):
    """Each weight's state begins at a step of its own."""
    maps = {f"qmap{n}": torch.linspace(-1, 1, 256) for n in (1, 2)}
    scales = {f"absmax{n}": torch.ones(-(-weight.numel() // 256)) for n in (1, 2)}
    states = {f"state{n}": torch.zeros(weight.shape, dtype=torch.uint8) for n in (1, 2)}
    self.state[weight].update(step=weight.numel(), **states, **maps, **scales)


def gone(place, name: str):
    return lambda monkeypatch, tmp_path: monkeypatch.delattr(place, name)


def put(place, name: str, value):
    return lambda monkeypatch, tmp_path: monkeypatch.setattr(place, name, value)


BROKEN = [
    ("text_progress", gone(tqdm.std, "trange")),
    ("text_progress", other_auto),
    ("quiet", put(sys.modules["torch.utils._pytree"], "log", logging.getLogger("torch.elsewhere"))),
    ("fused_lm_head", gone(trl.trainer.utils, "add_fused_lm_head")),
    ("fused_lm_head", put(trl.trainer.utils, "add_fused_lm_head", lambda model: None)),
    ("shared_prompt", gone(trl.trainer.utils, "add_fused_lm_head")),
    ("shared_prompt", without_mask),
    ("prompt_segments", functools.partial(other_unsloth, file="utils/attention_dispatch.py", name="prefix_seg_info")),
    ("recorded_stack", gone(torch.cuda, "graph_pool_handle")),
    ("one_update", gone(bitsandbytes.optim.optimizer, "sync_gpu")),
    ("one_update", put(bitsandbytes.optim.AdamW8bit, "update_step", lambda self, *given: None)),
    ("one_update", put(bitsandbytes.optim.optimizer.Optimizer2State, "init_state", other_steps)),
    ("cast_once", gone(torch, "_foreach_copy_")),
    ("cast_once", put(torch, "_foreach_add_", lambda first, second: None)),
    ("given_ids", gone(trl.DPOTrainer, "_prepare_dataset")),
    ("given_ids", no_step_for_data),
    ("given_ids", other_columns),
    ("cached_reference", gone(trl.DPOTrainer, "_compute_loss")),
    ("cached_reference", reads_another_attribute),
    ("unsloth_checkpointing", functools.partial(other_unsloth, file="models/rl.py", name="_unsloth_gradient")),
    ("llama_cpp", gone(unsloth_zoo.llama_cpp, "LLAMA_CPP_DEFAULT_DIR")),
    ("dataset_key", same_fingerprint),
]


def test_every_file_is_named_and_nothing_else():
    files = {path.stem for path in PATCHES_FOLDER.glob("*.py") if not path.stem.startswith("__")}
    assert files == set(PATCHES) and len(PATCHES) == len(files)
    assert {name for name, _ in BROKEN} == files


@pytest.mark.parametrize("name", PATCHES)
def test_patch_works_and_its_test_leaves_random_numbers_alone(name, capsys):
    before = torch.get_rng_state()
    assert works(name), fault(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out == ""


def test_a_self_test_does_not_depend_on_where_it_is_asked(monkeypatch):
    """Two cards once computed each prompt twice on the second: it asked first where gradients were off."""
    weight = torch.ones(2, 2, requires_grad=True)

    def gradient():
        product = weight @ weight
        expect(product.dtype == torch.float32, "autocast is on")
        torch.autograd.grad(product.sum(), weight)

    monkeypatch.setattr(prompt_segments, "self_test", gradient)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fault("prompt_segments") is None
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name, take_away", BROKEN, ids=[f"{i} {name}" for i, (name, _) in enumerate(BROKEN)])
def test_a_private_name_that_moved_is_noticed_and_said_once(name, take_away, monkeypatch, tmp_path, capsys):
    take_away(monkeypatch, tmp_path=tmp_path)
    assert not works(name)
    assert not works(name)  # is not said again
    monkeypatch.undo()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Patch {name} is left out (") and line.endswith(f"). {PATCHES[name]}")
    assert PATCHES[name].count(". ") == 0 and PATCHES[name].endswith(".")  # one sentence


def test_table_of_states(monkeypatch, capsys):
    assert show_state()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[name, "works"] for name in PATCHES]
    monkeypatch.delattr(unsloth_zoo.llama_cpp, "LLAMA_CPP_DEFAULT_DIR")
    assert not show_state()
    states = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert states.pop("llama_cpp").startswith("broken (ImportError: cannot import name 'LLAMA_CPP_DEFAULT_DIR'")
    assert set(states.values()) == {"works"}


# --------------------------------------------------------------------------------------- what a patch does, and without


@pytest.fixture
def none_works(monkeypatch):
    for module in (text_progress, fused_lm_head, shared_prompt, cast_once, given_ids, llama_cpp, dataset_key):
        monkeypatch.setattr(module, "works", lambda name: False)
    monkeypatch.setattr(unsloth_checkpointing, "works", lambda name: False)


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


def test_what_a_block_puts_on_a_forward_is_taken_off_after_an_error():
    inner = tiny_llama()
    for before in (None, object()):
        if before is not None:
            inner.forward = before
        with contextlib.suppress(RuntimeError), fused_lm_head.own_forward(inner):
            inner.forward = object()
            raise RuntimeError
        assert vars(inner).get("forward") is before
        with fused_lm_head.own_forward(inner):
            pass
        assert vars(inner).get("forward") is before


def test_fused_head_and_shared_prompts_are_there_in_the_block():
    inner = tiny_llama()
    with fused_lm_head.applied(inner) as fused:
        assert fused and inner.forward.__code__.co_filename == shared_prompt.__file__
        labels = torch.tensor([[-100, 2]])
        assert inner(input_ids=torch.tensor([[1, 2]]), labels=labels, fused_lm_head=True).log_probs.shape == (1, 1)
    assert "forward" not in vars(inner)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with fused_lm_head.applied(other) as fused:  # an architecture whose prompts can't be shared
        assert fused and other.forward.__code__.co_filename != shared_prompt.__file__


def test_data_with_ids_is_taken_as_it_is(monkeypatch):
    seen = []
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, *given: seen.append(given) or "prepared")
    monkeypatch.setattr(given_ids, "works", lambda name: True)
    trainer = given_ids.trainer_class()
    assert issubclass(trainer, trl.DPOTrainer) and trainer.__name__ == trl.DPOTrainer.__name__
    prepare = trainer.__new__(trainer)._prepare_dataset  # noqa: SLF001  (the step that TRL calls)
    table = datasets.Dataset.from_dict({"prompt": ["a"], "prompt_ids": [[1]], "chosen_ids": [[2]]})
    assert prepare(table, None, None, "train") == "prepared"
    assert seen == [(table, None, None, "train")]
    whole = table.add_column("rejected_ids", [[3]])
    assert prepare(whole, None, None, "train") is whole and len(seen) == 1


def test_reference_is_read_from_the_data():
    trainer = SimpleNamespace(precompute_ref_logps=False)
    use_cached_reference(trainer)
    assert trainer.precompute_ref_logps is True


@pytest.mark.parametrize(
    "device, on, after", [("cuda", True, "unsloth"), ("cuda", False, False), ("cpu", False, "unsloth")]
)
def test_checkpointing_follows_the_config_on_a_gpu(device, on, after):
    model = SimpleNamespace(device=torch.device(device), _unsloth_gradient_checkpointing="unsloth")
    unsloth_checkpointing.set_checkpointing(model, on)
    assert model._unsloth_gradient_checkpointing == after  # noqa: SLF001  (Unsloth's note, which has no public name)
    model = SimpleNamespace(device=torch.device(device))
    unsloth_checkpointing.set_checkpointing(model, on)
    assert vars(model).keys() == {"device"}


def test_key_of_a_dataset_on_disk(tmp_path):
    table = datasets.Dataset.from_dict({"a": [1, 2]})
    assert dataset_key.dataset_key(table) is None  # only in memory
    table.save_to_disk(tmp_path / "table")
    first, again = (datasets.load_from_disk(tmp_path / "table") for _ in range(2))
    key = dataset_key.dataset_key(first)
    assert key and key == dataset_key.dataset_key(again) != dataset_key.dataset_key(first.select([1]))


def test_without_a_patch_everything_stays_as_the_library_has_it(none_works, monkeypatch, tmp_path):
    bars = sys.modules["tqdm.auto"], sys.modules["tqdm.autonotebook"]
    text_progress.use_text_progress()
    assert bars == (sys.modules["tqdm.auto"], sys.modules["tqdm.autonotebook"])
    inner = tiny_llama()
    with fused_lm_head.applied(inner) as fused:
        assert not fused and "forward" not in vars(inner)
    assert not shared_prompt.can_share(inner)
    shared_prompt.share_prompts(inner)
    assert "forward" not in vars(inner)
    step = object()
    layer = torch.nn.ModuleDict(
        {"q": torch.nn.ModuleDict({"lora_A": torch.nn.ModuleDict({"d": torch.nn.Linear(1, 1, bias=False)})})}
    )
    trainer = SimpleNamespace(model=layer, training_step=step)
    cast_once.cast_weights_once(trainer)
    assert trainer.training_step is step
    assert given_ids.trainer_class() is trl.DPOTrainer
    model = SimpleNamespace(device=torch.device("cuda"), _unsloth_gradient_checkpointing=True)
    unsloth_checkpointing.set_checkpointing(model, False)
    assert vars(model)["_unsloth_gradient_checkpointing"] is True
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", "somewhere")
    assert llama_cpp.converter_places() == (Path("somewhere"), ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py"))
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "table")
    assert dataset_key.dataset_key(datasets.load_from_disk(tmp_path / "table")) is None


def test_places_of_the_converter_are_those_of_unsloth():
    folder, names = llama_cpp.converter_places()
    assert folder == Path(unsloth_zoo.llama_cpp.LLAMA_CPP_DEFAULT_DIR) and names
