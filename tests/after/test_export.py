"""What a finished run hands over: adapter, merged model, GGUF, and the run itself in more processes."""

import copy
import dataclasses
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import psutil
import pytest
import torch
import trl
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import helpers
from helpers import UserError, check_pairs, export_run, load_pairs, train_dpo
from helpers.after import export, trl_script
from helpers.common import cache_folder
from helpers.data.render import template_options
from helpers.model.embedded import embedded_model
from helpers.model.fingerprint import base_hash, config_hash, hash_tensors
from helpers.model.load import LORA_TARGETS
from helpers.model.logps import pair_logps
from helpers.run.card import model_card
from helpers.run.folder import POLICY_AT_START, DataInfo, Run, RunInfo, Status, describe_config
from helpers.train import resume
from helpers.train.job import hash_without_date
from helpers.train.processes import share_step
from tests.conftest import small_model

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_" + "Secret" * 6
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")

# The exported script; accelerate shards a model on GPUs only, so it is told here that these processes do.
SHARDED = """
import runpy
from accelerate import Accelerator
from accelerate.state import AcceleratorState

state, start = AcceleratorState.__init__, Accelerator.get_state_dict

def shard(self, *given, fsdp_plugin=None, **named):
    state(self, *given, fsdp_plugin=fsdp_plugin, **named)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if self.fsdp_plugin:
        self.distributed_type = "FSDP"

def look(self, model, **named):
    print(f"process {self.process_index} has {sorted({type(one).__name__ for one in model.parameters()})}", flush=True)
    return start(self, model, **named)

AcceleratorState.__init__, Accelerator.get_state_dict = shard, look
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def pairs():
    loaded = load_pairs()
    return loaded.select(range(16)), loaded.select(range(16, 22))


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory) -> Run:
    """Four steps at a rate at which the adapter is seen in every log-prob, in fp32."""
    model, tokenizer = helpers.load_model("embedded")
    return train_dpo(
        helpers.add_lora(model.float()),
        tokenizer,
        *pairs,
        tmp_path_factory.mktemp("run") / "short",
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_steps=0,
        eval_strategy="no",
        load_best_model_at_end=False,
        bf16=False,
    )


@pytest.fixture(scope="module")
def small(short_tokenizer, tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("models") / "small", short_tokenizer)


@pytest.fixture(autouse=True)
def base_of_small_runs(small, monkeypatch):
    monkeypatch.setenv("DPO_MODEL", str(small))


def made_up(folder: Path, train, test, tokenizer, small: Path, **rule) -> Run:
    """A run on the small model that trained nothing, for what is written from its figures, settings and pairs."""
    base, _ = helpers.load_model(str(small))
    reports = [check_pairs(pairs, tokenizer, 512, **rule) for pairs in (train, test)]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False}
    info = RunInfo(
        model=small.name,
        profile="cpu",
        config=describe_config(trl.DPOConfig(output_dir=str(folder), max_length=512, report_to="none", **settings)),
        train_pairs=len(reports[0].pairs),
        test_pairs=len(reports[1].pairs),
        data=DataInfo(reports[0].hash, reports[1].hash, given=hash_without_date(*reports, tokenizer)),
        base=base_hash(base),
        base_config=config_hash(base),
        start="",
        reference=POLICY_AT_START,
        versions={"trl": "1.15.0", "peft": "0.21.2", "unsloth": "2026.10.9"},
        machine="CPU",
        status=Status.FINISHED,
        steps=4,
        end=hash_tensors({}),
    )
    info.prompts_rule |= rule
    run = Run(folder, info, [], {"accuracy": 0.75}, None)
    run.adapter.mkdir(parents=True)
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    config = {"base_model_name_or_path": small.name} | lora
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, run.adapter / "adapter_model.safetensors")
    tokenizer.save_pretrained(run.adapter)
    return run


@pytest.fixture(scope="module")
def made(pairs, short_tokenizer, small, tmp_path_factory) -> Run:
    return made_up(tmp_path_factory.mktemp("made") / "short", *pairs, short_tokenizer, small)


def texts(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


# ------------------------------------------------------------------------------------------------ models

# Knows nothing of this project: what anybody would write. It computes in float32, so that only weights are rounded.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, pairs = sys.argv[1], json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

@torch.no_grad()
def log_prob(prompt, answer):
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    ids = tokenizer.apply_chat_template(prompt + answer, return_tensors="pt")["input_ids"]
    logps = model(ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

results = []
for precision in (torch.float16, torch.bfloat16):
    for weight in model.parameters():
        weight.data = weight.data.to(precision).float()
    results.append([[log_prob(p["prompt"], p[side]) for side in ("chosen", "rejected")] for p in pairs])
assert not {"unsloth", "helpers", "peft"} & set(sys.modules)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_merged_model_gives_the_same_log_probs_in_a_new_process(run, pairs, tmp_path):
    folder = export_run(run, "merged", tmp_path / "merged")
    rows = [{side: pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs[1]]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder)], input=json.dumps(rows), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    merged, in_bf16 = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    policy = torch.tensor(run.held_out[["chosen_policy", "rejected_policy"]].to_numpy())
    reference = torch.tensor(run.held_out[["chosen_reference", "rejected_reference"]].to_numpy())
    moved, error, error_in_bf16 = ((x - policy).abs().mean() for x in (reference, merged, in_bf16))
    assert error < 0.05 and error < moved / 50, (error, moved)  # nats a completion
    kept = int(re.search(r"the weights keep (\d+)% of the adapter's update", (folder / "README.md").read_text())[1])
    assert 90 <= kept <= 100
    assert error_in_bf16 > 10 * error, (error_in_bf16, error)  # why merged_model does not take bfloat16


@pytest.mark.slow
def test_share_of_the_update_that_rounding_keeps_is_measured_and_said(run, tmp_path, capfd):
    weights = load_file(run.adapter / "adapter_model.safetensors")
    weights = {name: tensor * (0.02 if "lora_B" in name else 1) for name, tensor in weights.items()}
    info = dataclasses.replace(run.info, end=hash_tensors(weights))
    small = dataclasses.replace(run, folder=tmp_path / "small", info=info)
    shutil.copytree(run.adapter, small.adapter)
    save_file(weights, small.adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, small.adapter)
    whole, half, coarse = (export.kept_update(model, t) for t in (torch.float32, torch.float16, torch.bfloat16))
    assert abs(whole - 1) < 1e-3 and 0 <= coarse < half / 2 < 0.4, (whole, half, coarse)
    card = (export_run(small, "merged", tmp_path / "merged") / "README.md").read_text()
    said = f"the weights keep {half:.0%} of the adapter's update"
    assert said in card and said in capfd.readouterr().out
    export_run(run, "merged", tmp_path / "whole")
    assert "the weights keep" not in capfd.readouterr().out


@pytest.mark.slow
def test_four_bit_base_is_dequantised_before_the_adapter_is_added(run, pairs, tokenizer):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32, quantization_config=four_bit)
    trained = pair_logps(PeftModel.from_pretrained(base, run.adapter), tokenizer, pairs[1])
    merged, _ = export.merged_model(dataclasses.replace(run, info=dataclasses.replace(run.info, profile="gpu")))
    assert not hasattr(merged.config, "quantization_config")
    other, _ = export.merged_model(run)  # into the weights that never were in 4 bits
    error, error_of_other = (
        (pair_logps(model.float(), tokenizer, pairs[1]).chosen - trained.chosen).abs().mean()
        for model in (merged, other)
    )
    # Not zero: bitsandbytes has a product of its own for 4-bit weights, which rounds in other places.
    assert error < error_of_other / 10, (error, error_of_other)


def converters_in(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("helpers.after.export.converter_places", lambda: (folder, ("convert_hf_to_gguf.py",)))


def test_gguf_without_a_converter_says_where_to_get_one(made, tmp_path, monkeypatch):
    converters_in(tmp_path / "none", monkeypatch)
    with pytest.raises(UserError, match="git clone.*llama.cpp.*--outtype q8_0"):
        export_run(made, "gguf", tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gguf_of_a_converter_that_fails(run, tmp_path, monkeypatch):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model LlamaForCausalLM is not supported')")
    converters_in(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="converter failed .Model LlamaForCausalLM is not supported"):
        export_run(run, "gguf", tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


# ------------------------------------------------------------------------------------------------ what is written


def test_refused(made, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'zip'.*'adapter', 'merged', 'gguf', 'torchrun', 'trl'"):
        export_run(made, "zip", tmp_path / "zip")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match="someone/model needs HF_TOKEN"):
        export_run(made, "adapter", tmp_path / "adapter", hub="someone/model")
    with pytest.raises(UserError, match="holds your pairs"):
        export_run(made, "trl", tmp_path / "trl", hub="someone/model")
    with pytest.raises(UserError, match="needs train= and test="):
        export_run(made, "trl", tmp_path / "trl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
@pytest.mark.parametrize("form", ["adapter", "merged", "torchrun", "trl"])
def test_what_was_damaged_is_not_handed_over(made, pairs, tmp_path, form, name):
    copy = Run(shutil.copytree(made.folder, tmp_path / "copy"), made.info, [], {}, None)
    (copy.adapter / name).write_text("{")
    with pytest.raises(UserError, match="copy/adapter is damaged|adapter cannot be loaded"):
        export_run(copy, form, tmp_path / form, train=pairs[0], test=pairs[1])
    (copy.adapter / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}|adapter cannot be loaded"):
        export_run(copy, form, tmp_path / form, train=pairs[0], test=pairs[1])
    with pytest.raises(UserError, match="no run folder"):
        export_run(copy.adapter, form, tmp_path / form)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
def test_nothing_is_overwritten(made, tmp_path, monkeypatch):
    folder = export_run(made, "adapter", tmp_path / "adapter")
    (folder / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already.*replace=True"):
        export_run(made, "adapter", folder)
    export_run(made, "adapter", folder, replace=True)
    assert (tmp_path / "adapter.old-1" / "note.txt").read_text() == "mine"
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="^adapter exists already"):
        export_run(made, "adapter", ".")
    monkeypatch.chdir(tmp_path)
    export_run(made, "adapter", folder, replace=True)  # nothing in it but an export: none is kept
    monkeypatch.setattr(
        "helpers.after.export.model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        export_run(made, "adapter", folder, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.old-1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "mine/note.txt"])
def test_an_export_that_was_edited_is_kept(made, tmp_path, name):
    folder = export_run(made, "adapter", tmp_path / "adapter")
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write("(by hand)")
    edited = texts(folder)
    export_run(made, "adapter", folder, replace=True)
    kept = tmp_path / "adapter.old-1"
    assert (kept / name).read_text(encoding="utf-8").endswith("(by hand)") and texts(kept) == edited
    assert "(by hand)" not in texts(folder)
    other = dataclasses.replace(made, info=dataclasses.replace(made.info, steps=5))  # what it replaces nobody edited
    export_run(other, "adapter", folder, replace=True)
    assert "5 steps" in texts(folder) and sorted(path.name for path in tmp_path.iterdir()) == ["adapter", kept.name]


def fill(disk: Path, room: int) -> None:
    (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - room))


@pytest.mark.slow
def test_full_disk_is_said_and_nothing_is_left(made, pairs, disk):
    """Of a copy, for which shutil lists paths, and of a file of our own."""
    fill(disk, 0)
    for form in ("adapter", "trl"):
        with pytest.raises(UserError, match=rf"^{form} could not be written \(No space left on device\)"):
            export_run(made, form, disk / form, train=pairs[0], test=pairs[1])
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.slow
@pytest.mark.parametrize("written", [[], ["model.safetensors"], ["model.safetensors", "tokenizer.json"]])
def test_full_disk_under_a_merged_model(small_run, disk, tmp_path, written):
    """In the weights (safetensors), the tokenizer (tokenizers), and in what follows."""
    whole = export_run(small_run, "merged", tmp_path / "whole")
    fill(disk, sum((whole / name).stat().st_size + 8192 for name in written))
    with pytest.raises(UserError, match=r"^m could not be written \(No space left on device\)"):
        export_run(small_run, "merged", disk / "m")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.slow
def test_full_disk_under_a_gguf_file(small_run, disk, tmp_path, monkeypatch):
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys; open(sys.argv[3], 'wb').write(bytes(100 << 20))")
    converters_in(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"^m could not be written \(No space left on device\)"):
        export_run(small_run, "gguf", disk / "m")
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_run_folder_has_the_same_card(run):
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    assert card == model_card(run, "run")
    assert "`Run.load`" in card and str(run.folder.parent) not in card
    assert "16 preference pairs to train on, 6 held out, from `pairs.jsonl`" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"  # of the pairs that come with this project


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged", "torchrun", "trl"])
def test_no_path_of_this_machine_and_no_token(form, run, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    written = texts(export_run(run, form, tmp_path / form, train=pairs[0], test=pairs[1]))
    assert TOKEN not in written and (form != "torchrun" or "model: embedded" in written)
    for path in (tmp_path, run.folder, ROOT, Path.home(), cache_folder()):
        assert str(path) not in written


def test_upload_sends_the_token_to_the_hub_alone(made, tmp_path, monkeypatch, capfd):
    """A server that refuses all: what it was asked with, and what is said of it."""
    asked = []

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(
                (self.path, self.headers["Authorization"], self.rfile.read(int(self.headers["Content-Length"])))
            )
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="did not take someone/model.*status 403.*HF_TOKEN") as error:
        export_run(made, "adapter", tmp_path / "adapter", hub="someone/model")
    server.shutdown()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert asked[0][:2] == ("/api/repos/create", f"Bearer {TOKEN}")
    assert json.loads(asked[0][2])["visibility"] == "private"
    output = capfd.readouterr()
    assert TOKEN not in str(error.value) + output.out + output.err + texts(tmp_path)


# ------------------------------------------------------------------------------------------------ more processes


@pytest.mark.slow
def test_other_pairs_and_other_references_are_refused(made, pairs, tmp_path):
    train, test = pairs
    with pytest.raises(UserError, match="train= is not what the run short was given: 15 pairs here, 16 there"):
        export_run(made, "trl", tmp_path / "trl", train=train.select(range(15)), test=test)
    changed = dataclasses.replace(made, info=dataclasses.replace(made.info, reference="another model"))
    with pytest.raises(UserError, match="reference is not its base model.*Merge"):
        export_run(changed, "trl", tmp_path / "trl", train=train, test=test)
    shutil.copytree(made.adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "reference").mkdir()
    changed = dataclasses.replace(made, folder=tmp_path / "run")
    with pytest.raises(UserError, match="started from a trained adapter"):
        export_run(changed, "trl", tmp_path / "trl", train=train, test=test)


@pytest.mark.slow
def test_template_that_writes_the_date_makes_no_other_pairs_tomorrow(
    pairs, short_tokenizer, small, tmp_path, day, monkeypatch
):
    dated = copy.deepcopy(short_tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + dated.chat_template
    base = shutil.copytree(small, tmp_path / small.name)
    dated.save_pretrained(base)
    monkeypatch.setenv("DPO_MODEL", str(base))
    day(1)
    run = made_up(tmp_path / "run", *pairs, dated, base)
    day(2)
    folder = export_run(run, "trl", tmp_path / "trl", train=pairs[0], test=pairs[1])
    assert len((folder / "data" / "train.jsonl").read_text().splitlines()) == 16
    with pytest.raises(UserError, match="train= is not what the run run was given"):
        export_run(run, "trl", tmp_path / "other", train=pairs[0].select(range(1, 16)), test=pairs[1])
    dated.chat_template = dated.chat_template.replace("%d", "day %d")
    dated.save_pretrained(base)
    with pytest.raises(UserError, match="is not what the run run was given.*another chat template"):
        export_run(run, "trl", tmp_path / "other", train=pairs[0], test=pairs[1])


@pytest.mark.slow
def test_long_prompts_are_treated_as_in_the_run(pairs, short_tokenizer, small, tmp_path):
    train, test = pairs
    longest = [{"role": "user", "content": "word " * 100}]
    train = train.map(lambda row, place: {"prompt": longest if place == 3 else row["prompt"]}, with_indices=True)
    run = made_up(tmp_path / "run", train, test, short_tokenizer, small, max_prompt_length=100, on_long_prompt="drop")
    assert run.info.train_pairs == 15
    data = export_run(run, "trl", tmp_path / "trl", train=train, test=test) / "data"
    assert len((data / "train.jsonl").read_text().splitlines()) == 15
    with pytest.raises(UserError, match="not made by add_lora"):  # of one projection
        export_run(run, "torchrun", tmp_path / "torchrun", train=train, test=test)
    lora = json.loads((run.adapter / "adapter_config.json").read_text()) | {"target_modules": LORA_TARGETS}
    (run.adapter / "adapter_config.json").write_text(json.dumps(lora))
    written = export_run(run, "torchrun", tmp_path / "torchrun", train=train, test=test) / "settings.yaml"
    settings = yaml.safe_load(written.read_text())
    assert (settings["max_prompt_length"], settings["on_long_prompt"]) == (100, "drop")
    assert settings["eval_strategy"] == "no" and settings["model"] == "small"


@pytest.mark.slow
def test_rows_keep_what_they_pass_to_the_chat_template(pairs, short_tokenizer, small, tmp_path):
    """TRL's script reads `tools` and `chat_template_kwargs` of each row, from JSON lines that datasets reads."""
    rows = pairs[0].select(range(3)).to_list()
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    day = {"type": "object", "properties": {"day": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": city}}]
    rows[0] |= {"tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    tools = [{"type": "function", "function": {"name": "calendar", "parameters": day}}]
    rows[1] |= {"tools": json.dumps(tools), "chat_template_kwargs": None}
    rows[2] |= {"tools": None, "chat_template_kwargs": None}
    train, test = datasets.Dataset.from_list(rows), pairs[1]
    run = made_up(tmp_path / "run", train, test, short_tokenizer, small)
    data = export_run(run, "trl", tmp_path / "trl", train=train, test=test) / "data"
    read = datasets.load_dataset(str(data), cache_dir=str(tmp_path / "cache"))
    assert [template_options(row) for row in read["train"]] == [template_options(row) for row in train]
    assert template_options(read["train"][0])["tools"][0]["function"]["parameters"] == city  # without a key of others
    # TRL unpacks the column of each row, so it is a dict even if the row had none.
    assert all(isinstance(options, dict) for options in read["train"]["chat_template_kwargs"])
    assert not {"tools", "chat_template_kwargs"} & set(json.loads((data / "test.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_of_a_gpus_run_is_exported_for_trl_alone(made, pairs, tmp_path, checkpointing):
    """Without it TRL needs far more memory; reentrant, as Unsloth sets it there, "a variable is marked ready twice"."""
    train, test = pairs
    config = made.info.config | {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    on_gpu = dataclasses.replace(made, info=dataclasses.replace(made.info, config=config, profile="gpu"))
    folder = export_run(on_gpu, "trl", tmp_path / "trl", train=train, test=test)
    settings = yaml.safe_load((folder / "dpo.yaml").read_text())
    assert settings["gradient_checkpointing"] is True and settings["load_in_4bit"] is True
    assert "gradient_checkpointing_kwargs" not in settings  # TRL's default: use_reentrant is False
    readme = (folder / "README.md").read_text()
    assert "A step takes 4 pairs" in readme and "and bitsandbytes." in readme


def test_global_batch_is_shared_exactly(monkeypatch):
    for batch, largest, processes in [(8, 4, 1), (8, 4, 2), (8, 8, 2), (12, 4, 2), (8, 4, 8), (6, 4, 1)]:
        size, pieces = trl_script.share(batch, largest, processes)
        assert size * pieces * processes == batch and size <= largest
    for batch, number in ((8, 3), (2, 4)):  # in the words of train_dpo
        with pytest.raises(SystemExit) as said:
            trl_script.share(batch, 4, number)
        started = SimpleNamespace(num_processes=number)
        monkeypatch.setattr("helpers.train.processes.processes", lambda started=started: started)
        with pytest.raises(UserError) as expected:
            share_step({"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1})
        assert str(said.value) == str(expected.value)


def test_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    assert trl_script.last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert Path(trl_script.last_checkpoint(tmp_path)).name == "checkpoint-10"


@pytest.fixture(scope="module")
def small_run(small, pairs, tmp_path_factory) -> Run:
    """Four steps of four pairs with the small model, in fp32."""
    model, tokenizer = helpers.load_model(str(small))
    return train_dpo(
        helpers.add_lora(model.float()),
        tokenizer,
        *pairs,
        tmp_path_factory.mktemp("small") / "run",
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        warmup_steps=0,
        logging_steps=1,
        eval_strategy="no",
        load_best_model_at_end=False,
        bf16=False,
    )


def run_in_two(
    folder: Path, *options: str, kill_at: int | None = None, script: str = "train.py", launcher=TORCHRUN
) -> str:
    """What the exported script prints in two processes; with `kill_at` all of it is killed after so many steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, script, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out = ""
    for line in process.stdout:
        out += line
        if out.count("{'loss'") == kill_at:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()  # the workers have sessions of their own
            break
    out += process.stdout.read()
    assert bool(process.wait()) == (kill_at is not None), out[-3000:]
    return out


def losses_of(history: list[dict]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.slow
def test_trl_in_two_processes_killed_and_resumed_has_the_losses_of_the_run(small_run, small, pairs, tmp_path):
    folder = export_run(small_run, "trl", tmp_path / "trl", train=pairs[0], test=pairs[1])
    options = ["--model_name_or_path", str(small), "--dtype", "float32"]
    out = run_in_two(folder, *options, kill_at=3)
    assert "2 processes, 4 pairs a step: 2 in a forward, 1 forwards each; from the start" in out
    assert "resuming from checkpoint-2" in run_in_two(folder, *options)
    state = json.loads((folder / "output" / "checkpoint-4" / "trainer_state.json").read_text())
    found, expected = losses_of(state["log_history"]), losses_of(small_run.history)
    assert found == pytest.approx(expected, abs=2e-4) and max(found) - min(found) > 0.02  # they move


@pytest.mark.slow
def test_torchrun_in_two_processes_repeats_the_run(small_run, small, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CPU_BF16", "0")  # in 16 bits a new adapter has other weights
    folder = export_run(small_run, "torchrun", tmp_path / "torchrun", train=pairs[0], test=pairs[1])
    run_in_two(folder, f"model={small}", "folder=again")
    again = Run.load(folder / "again")
    assert again.info.start == small_run.info.start and again.info.machine.startswith("2 x ")
    assert resume.differences(dataclasses.replace(again.info, base=small_run.info.base), small_run.info) == []
    assert losses_of(again.history) == pytest.approx(losses_of(small_run.history), abs=2e-4)


@pytest.mark.slow
def test_runs_that_no_script_repeats_are_refused(made, pairs, tmp_path):
    lora = json.loads((made.adapter / "adapter_config.json").read_text())
    other = dataclasses.replace(made, info=dataclasses.replace(made.info, reference="another model"))
    with pytest.raises(UserError, match="given a reference model"):
        export_run(other, "torchrun", tmp_path / "torchrun", train=pairs[0], test=pairs[1])
    other = dataclasses.replace(made, folder=tmp_path / "run")
    shutil.copytree(made.adapter, other.adapter)
    lora["target_modules"] = LORA_TARGETS
    changes = [{"lora_alpha": 2 * lora["r"]}, {"use_dora": True}, {"lora_dropout": 0.1}, {"modules_to_save": ["a"]}]
    for change in [*changes, {"target_modules": LORA_TARGETS[:4]}]:
        (other.adapter / "adapter_config.json").write_text(json.dumps(lora | change))
        with pytest.raises(UserError, match="not made by add_lora"):
            export_run(other, "torchrun", tmp_path / "torchrun", train=pairs[0], test=pairs[1])
    for change in [{"rank_pattern": {"q_proj": 2}}, {"layers_to_transform": [0]}, {"trainable_token_indices": [3]}]:
        (other.adapter / "adapter_config.json").write_text(json.dumps(lora | change))
        for form, sentence in (("torchrun", "not made by add_lora"), ("trl", f"cannot be given: {[*change][0]}")):
            with pytest.raises(UserError, match=sentence):
                export_run(other, form, tmp_path / form, train=pairs[0], test=pairs[1])


@pytest.mark.slow
def test_script_of_trl_makes_the_adapter_of_the_run(made, pairs, tmp_path):
    """Of another kind than the usual, by a pattern, and on experts in one tensor as PEFT writes them."""
    lora = json.loads((made.adapter / "adapter_config.json").read_text())
    own = dataclasses.replace(made, folder=tmp_path / "run")
    shutil.copytree(made.adapter, own.adapter)
    pattern = {r".*\.gate_up_proj": 2 * lora["r"]}
    fused = {"target_modules": LORA_TARGETS[:4], "target_parameters": ["gate_up_proj", "down_proj"]}
    fused |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    rest = {"use_rslora": True, "use_dora": True, "modules_to_save": ["lm_head"], "target_modules": r".*\.q_proj"}
    found = []
    for number, change in enumerate((rest, fused)):
        (own.adapter / "adapter_config.json").write_text(json.dumps(lora | change))
        folder = export_run(own, "trl", tmp_path / f"trl-{number}", train=pairs[0], test=pairs[1])
        found.append(yaml.safe_load((folder / "dpo.yaml").read_text()))
    export_run(own, "torchrun", tmp_path / "torchrun", train=pairs[0], test=pairs[1])
    told = {"use_rslora": True, "use_dora": True, "lora_modules_to_save": ["lm_head"]}
    assert told.items() <= found[0].items() and found[0]["lora_target_modules"] == [r".*\.q_proj"]
    assert set(found[1]["lora_target_modules"]) == set(LORA_TARGETS) and not told.keys() & found[1].keys()


@pytest.mark.slow
def test_trl_with_a_model_cut_among_two_processes_has_the_losses_of_the_run(small_run, small, pairs, tmp_path):
    folder = export_run(small_run, "trl", tmp_path / "trl", train=pairs[0], test=pairs[1])
    (folder / "sharded.py").write_text(SHARDED)
    launcher = ("accelerate.commands.launch", "--config_file", "fsdp.yaml")
    options = ["--model_name_or_path", str(small), "--dtype", "float32", "--load_in_4bit", "false"]
    out = run_in_two(folder, *options, script="sharded.py", launcher=launcher)
    assert all(f"process {number} has ['DTensor']" in out for number in range(2)), out[-3000:]
    state = json.loads((folder / "output" / "checkpoint-4" / "trainer_state.json").read_text())
    assert losses_of(state["log_history"]) == pytest.approx(losses_of(small_run.history), abs=2e-4)
    saved, own = (load_file(one / "adapter_model.safetensors") for one in (folder / "output", small_run.adapter))
    assert max((saved[name] - value).abs().max() for name, value in own.items()) < 1e-2
    assert "fsdp.yaml" in (folder / "README.md").read_text()
