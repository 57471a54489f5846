"""Who the model is: its folder, its base, its adapter, and what decides the reference's log-probs."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import helpers
from helpers import UserError, export_run, open_run, session, train_dpo
from helpers.after.export import kept_update
from helpers.common import setting
from helpers.data.load import load_pairs
from helpers.model import load
from helpers.model.embedded import EMBEDDED_HUB_NAME, embedded_folder, embedded_model
from helpers.model.fingerprint import base_hash, config_hash, hash_tensors, is_fresh, tokenizer_hash
from helpers.model.logps import pair_logps, reference_file
from helpers.model.policy import Policy, check_adapter
from helpers.patches.shared_prompt import can_share
from helpers.train.settings import complete_settings

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
QUICK = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "bf16": False, "report_to": "none"}
QUICK |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def tiny(seed: int = 0, kind=LlamaForCausalLM, config=LlamaConfig, vocab_size: int = 64, **settings):
    torch.manual_seed(seed)
    return kind(config(vocab_size=vocab_size, **SIZES | settings))


def save(folder, tokenizer, **settings):
    """A tiny random model with the tokenizer in a folder."""
    tiny(vocab_size=len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ folders and names


@pytest.fixture
def places(tmp_path, short_tokenizer, monkeypatch):
    """A model in models/mine of a home, and the working directory elsewhere."""
    short_tokenizer.save_pretrained(tmp_path / "home" / "models" / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("name", ["~/models/mine", "models/mine"])
def test_a_folder_is_found_from_any_working_directory(places, monkeypatch, name, passed):
    monkeypatch.setattr(load, "PROJECT", places / "home")
    monkeypatch.setenv("DPO_MODEL", "" if passed else name)
    tokenizer = helpers.load_tokenizer(name if passed else None)
    assert tokenizer.name_or_path == str(places / "home" / "models" / "mine")


def test_a_relative_folder_that_is_passed_starts_at_the_working_directory(places, monkeypatch):
    with pytest.raises(UserError, match="models/mine.*no folder here"):
        helpers.load_tokenizer("models/mine")
    monkeypatch.chdir(places / "home")
    name = helpers.load_tokenizer("models/mine").name_or_path
    assert name == str(places / "home" / "models" / "mine")
    shutil.copytree(places / "home", places / "project")
    monkeypatch.setattr(load, "PROJECT", places / "project")
    assert helpers.load_tokenizer("models/mine").name_or_path == name
    monkeypatch.setenv("DPO_MODEL", "models/mine")  # one of .env starts at the project, wherever a notebook runs
    assert helpers.load_tokenizer().name_or_path == str(places / "project" / "models" / "mine")


@pytest.mark.slow
def test_a_model_and_the_base_of_an_adapter_are_found_from_any_working_directory(places, tokenizer, monkeypatch):
    folder = save(places / "home" / "models" / "mine", tokenizer)
    model, _ = helpers.load_model("~/models/mine")
    weight = model.get_input_embeddings().weight
    assert model.config.name_or_path == str(folder)
    model = helpers.add_lora(model)
    model.save_pretrained(places / "adapter")
    config = places / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "mine"}))
    tokenizer.save_pretrained(places / "adapter")
    save(places / "elsewhere" / "models" / "mine", tokenizer, seed=1)  # not that of the working directory
    monkeypatch.setattr(load, "PROJECT", places / "home")
    monkeypatch.setenv("DPO_MODEL", "models/mine")
    assert torch.equal(helpers.load_model("../adapter")[0].get_input_embeddings().weight, weight)
    assert torch.equal(helpers.load_model()[0].get_input_embeddings().weight, weight)
    assert not torch.equal(helpers.load_model("models/mine")[0].get_input_embeddings().weight, weight)


def test_settings_of_the_project_are_read_from_another_folder(places, monkeypatch):
    (places / "home" / ".env").write_text("DPO_TEST_D=from the project\n")
    monkeypatch.setattr(session, "PROJECT", places / "home")
    monkeypatch.delenv("DPO_TEST_D", raising=False)
    session.load_settings()
    assert setting("DPO_TEST_D") == "from the project"


def test_the_embedded_model_is_known_by_its_files(tmp_path):
    original = embedded_folder()
    embedded_model()

    def name_of(folder):
        return load.public_name(SimpleNamespace(config=SimpleNamespace(name_or_path=str(folder))))

    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(original / "config.json", copied)
    (copied / "model.safetensors").symlink_to(original / "model.safetensors")
    assert name_of(copied) == EMBEDDED_HUB_NAME
    (copied / "config.json").write_text((original / "config.json").read_text().replace("100000", "200000"))
    assert name_of(copied) == "copied"
    shutil.copy(original / "config.json", copied)
    (copied / "model.safetensors").unlink()  # its settings, and weights of one's own
    (copied / "model.safetensors").write_bytes(b"0" * (original / "model.safetensors").stat().st_size)
    assert name_of(copied) == "copied"
    mine = tmp_path / original.name  # its name, and weights of one's own
    tiny().save_pretrained(mine)
    assert name_of(mine) == original.name != EMBEDDED_HUB_NAME


@pytest.fixture(scope="module")
def pairs():
    loaded = load_pairs()
    return loaded.select(range(6)), loaded.select(range(16, 19))


@pytest.fixture(scope="module")
def mine(tmp_path_factory, tokenizer, pairs):
    """(run, folder of its base): a run on a model in a folder of one's own."""
    folder = save(tmp_path_factory.mktemp("a") / "mine [v2]", tokenizer, seed=0)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))  # which transformers does not save again
    model, _ = helpers.load_model(str(folder))
    run = train_dpo(helpers.add_lora(model.float()), tokenizer, *pairs, folder.parent / "run [1]", **QUICK)
    assert run.info.model == "mine [v2]"
    return run, folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged", "gguf", "torchrun", "trl", "open_run"])
@pytest.mark.parametrize("change", ["weights", "settings"])
def test_another_model_of_the_same_folder_name_is_no_base_of_the_run(
    mine, tmp_path, tokenizer, pairs, monkeypatch, form, change
):
    run, folder = mine
    other = tmp_path / folder.name
    if change == "weights":
        save(other, tokenizer, seed=1)
    else:
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 2
        (other / "config.json").write_text(json.dumps(config))
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys; open(sys.argv[3], 'w').close()")
    places = (tmp_path, ("convert_hf_to_gguf.py",))
    monkeypatch.setattr("helpers.after.export.converter_places", lambda: places)
    has = {"weights": "other weights", "settings": "the same weights, but another config.json"}[change]

    def written():
        if form == "open_run":
            return open_run(run)
        return export_run(run, form, tmp_path / "out [1]", train=pairs[0], test=pairs[1])

    monkeypatch.setenv("DPO_MODEL", str(other))
    with pytest.raises(UserError, match=rf"not the one under the run in run \[1\]: mine \[v2\] has {has}"):
        written()
    assert not (tmp_path / "out [1]").exists()
    shutil.rmtree(other)
    shutil.copytree(folder, other)  # the base itself, in another place
    written()


@pytest.mark.slow
def test_a_merged_model_is_the_policy_of_its_run(mine, tmp_path, tokenizer, pairs, monkeypatch):
    run, folder = mine
    monkeypatch.setenv("DPO_MODEL", str(folder))
    opened = open_run(run)
    merged, _ = helpers.load_model(str(export_run(run, "merged", tmp_path / "merged [1]")))
    there, here = (pair_logps(one.float(), tokenizer, pairs[1]).chosen for one in (opened.model, merged))
    assert torch.allclose(there, here, atol=0.02)


@pytest.mark.slow
def test_a_reference_with_other_settings_is_another_reference(mine, tmp_path, tokenizer, pairs, monkeypatch):
    _, folder = mine
    monkeypatch.setenv("DPO_MODEL", str(folder))
    (model, _), (reference, _) = helpers.load_model(), helpers.load_model()
    call = {"folder": tmp_path / "run", "ref_model": reference.float()} | QUICK
    policy = helpers.add_lora(model.float())
    run = train_dpo(policy, tokenizer, *pairs, **call)
    open_run(run, ref_model=reference)
    reference.config.rope_parameters["rope_theta"] *= 2
    with pytest.raises(UserError, match="run is another model than the ref_model"):
        open_run(run, ref_model=reference)
    with pytest.raises(UserError, match="other reference"):
        train_dpo(policy, tokenizer, *pairs, **call)
    older = dataclasses.replace(run, info=dataclasses.replace(run.info))
    older.info.reference = run.info.reference.rpartition(" ")[0]  # did not say
    open_run(older, ref_model=reference)


# ------------------------------------------------------------------------------------------------ adapters

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}
REFUSED = {
    "another name": "adapters mine.*load_model",
    "two": "adapters default, other.*selected_adapters",
    "IA3": "IA3; only LoRA",
    "LoHa": "LOHA; only LoRA",
    "pissa": "init_lora_weights='pissa'",
    "olora": "init_lora_weights='olora'",
    "bias": "bias='all'",
    "output layer": "LoRA on the output layer.*modules_to_save",
    "tied embeddings": "LoRA on the embedding, .* output layer.*target_modules",
    "on an adapter": "an adapter on top of an adapter",
    "more layers": "made with layer_replication",
    "invoked": "made with alora_invocation_tokens",
    "merged": "merged into the weights.*unmerge_adapter",
    "frozen": "frozen or switched off.*is_trainable=True",
    "switched off": "frozen or switched off",
    "base trained": r"1 weights of the base .*norm\.weight.*requires_grad_",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_a_run_cannot_keep_are_refused_at_the_start(kind):
    name = "default"
    if kind == "IA3":
        config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    elif kind == "LoHa":
        config = LoHaConfig(**LORA)
    elif kind in ("pissa", "olora"):
        config = LoraConfig(**LORA, init_lora_weights=kind)
    elif kind == "bias":
        config = LoraConfig(**LORA, bias="all")
    elif kind in ("output layer", "tied embeddings"):
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head" if kind == "output layer" else "embed_tokens"])
    elif kind == "more layers":
        config = LoraConfig(**LORA, layer_replication=[(0, 2), (1, 2)])
    elif kind == "invoked":
        config = LoraConfig(**LORA, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    else:
        config = LoraConfig(**LORA)
        name = "mine" if kind == "another name" else "default"
    model = get_peft_model(tiny(tie_word_embeddings=kind == "tied embeddings"), config, adapter_name=name)
    if kind == "two":
        model.add_adapter("other", LoraConfig(**LORA))
    elif kind == "on an adapter":
        model = get_peft_model(model, LoraConfig(**LORA))
    elif kind == "merged":
        model.merge_adapter()
    elif kind == "frozen":
        model.requires_grad_(False)
    elif kind == "switched off":
        model.base_model.disable_adapter_layers()
    elif kind == "base trained":
        model.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(UserError, match=REFUSED[kind]):
        complete_settings(model, {})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}, "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
    ],
)
def test_adapters_that_a_run_can_keep(more):
    check_adapter(get_peft_model(tiny(), LoraConfig(**LORA | more)))


KINDS = {
    "LoRA": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_tensor_is_the_adapters_and_none_the_bases(kind):
    base = tiny()
    before = base_hash(base)
    model = get_peft_model(base, LoraConfig(**LORA | KINDS[kind]))
    assert base_hash(model) == before
    policy, ids = Policy(model, None), torch.arange(8)[None]
    at_start = policy.weights()
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    with torch.no_grad():
        assert not policy.is_fresh or torch.allclose(model(ids).logits, expected, atol=1e-6)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        hashed, kept = policy.adapter, weight.detach().clone()
        with torch.no_grad():
            weight += 0.1
        assert policy.adapter != hashed and base_hash(model) == before, name
        if "lora_A" not in name and "lora_embedding_B" not in name:
            assert not is_fresh(model), name
        with torch.no_grad():
            weight.copy_(kept)
    with torch.no_grad():
        for weight in trained.values():
            weight += 0.1
    policy.put_back(at_start)
    assert all(torch.equal(at_start[name], weight) for name, weight in policy.weights().items())


def test_a_base_that_was_changed_is_another_base():
    model = tiny()
    found = [base_hash(model)]
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    found.append(base_hash(model))
    model.model.norm.weight.data = model.model.norm.weight.data + 1  # behind torch's back
    found.append(base_hash(model))
    assert len(set(found)) == 3 and base_hash(model) == found[-1]


def test_a_weight_that_is_one_number_is_hashed():
    """Apertus has some."""
    found = {hash_tensors({"alpha": torch.tensor(value)}) for value in (0.5, 0.25)}
    assert len(found | {hash_tensors({"alpha": torch.tensor([0.5])}), hash_tensors({"alpha": torch.empty(0)})}) == 4


def test_what_a_tokenizer_makes_of_a_text_decides_its_hash(short_tokenizer):
    other = copy.deepcopy(short_tokenizer)
    found = [tokenizer_hash(short_tokenizer), tokenizer_hash(other)]
    assert found[0] == found[1]
    other.add_tokens(["<one more>"])
    found.append(tokenizer_hash(other))
    other.chat_template += " "
    found.append(tokenizer_hash(other))
    assert len(set(found)) == 3


def test_the_hub_is_not_asked_whether_an_adapter_is_fresh(monkeypatch):
    """Each scoring of an opened run asked it, and PEFT warned if it could not be reached."""
    model = get_peft_model(tiny(), LoraConfig(**LORA))
    model.active_peft_config.base_model_name_or_path = "owner/name"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *given: pytest.fail("asked"))
    assert is_fresh(model)


def test_a_fresh_adapter_is_fresh():
    assert is_fresh(get_peft_model(tiny(), LoraConfig(**LORA)))
    assert is_fresh(get_peft_model(tiny(), LoraConfig(r=4, target_modules=["embed_tokens"])))
    assert not is_fresh(get_peft_model(tiny(), LoraConfig(**LORA, init_lora_weights=False)))


@pytest.mark.slow
def test_a_run_with_modules_to_save_opens_as_it_was_trained(tmp_path, tokenizer, pairs, monkeypatch):
    folder = save(tmp_path / "mine", tokenizer)
    monkeypatch.setenv("DPO_MODEL", str(folder))
    model, _ = helpers.load_model()
    model = get_peft_model(model.float(), LoraConfig(**LORA, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    run = train_dpo(model, tokenizer, *pairs, tmp_path / "run", **QUICK)
    assert float(run.history[0]["rewards/margins"]) == pytest.approx(0, abs=1e-4)
    opened = open_run(run)
    found = opened.both(lambda one: pair_logps(one, tokenizer, pairs[1]).chosen.numpy())
    assert found["reference"] == pytest.approx(run.held_out.chosen_reference.to_numpy(), abs=5e-3)
    assert found["policy"] == pytest.approx(run.held_out.chosen_policy.to_numpy(), abs=5e-3)
    assert abs(found["policy"] - found["reference"]).max() > 0.01


@pytest.mark.parametrize("kind", ["GPT-2", "fused experts"])
def test_lora_on_other_architectures(kind, capsys):
    if kind == "GPT-2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
        with pytest.raises(UserError, match=r"add_lora\(model, target_modules=.*It has c_attn, c_fc, c_proj\."):
            helpers.add_lora(model)
        model = helpers.add_lora(model, target_modules=["c_attn", "c_fc"])
        names = {"c_attn", "c_fc"}
    else:
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
        model = helpers.add_lora(tiny(kind=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, **experts))
        assert "no layers down_proj, gate_proj, up_proj; LoRA is on experts, k_proj, o_proj, q_proj, v_proj." in (
            capsys.readouterr().out
        )
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"}
    adapted = [name.split(".lora_A")[0] for name, _ in model.named_modules() if "lora_A" in name]
    assert {name.rpartition(".")[2] for name in adapted} == names


def test_fused_experts_are_part_of_the_merged_model():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    kind = {"kind": Qwen3MoeForCausalLM, "config": Qwen3MoeConfig}
    model, ids = helpers.add_lora(tiny(**kind, **experts)).eval(), torch.arange(3, 20)[None]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.05
        policy, reference = model(ids).logits, tiny(**kind, **experts).eval()(ids).logits
        assert 0.99 < kept_update(model, torch.float32) < 1.01 and kept_update(model, torch.float16) < 1.01
        merged = model.merge_and_unload(safe_merge=True)(ids).logits
    assert torch.allclose(merged, policy, atol=1e-4) and not torch.allclose(policy, reference, atol=1e-2)


@pytest.mark.slow
def test_fused_experts_are_trained_and_handed_over(pairs, tokenizer, tmp_path, monkeypatch):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    folder = save(tmp_path / "mine", tokenizer, kind=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, **experts)
    monkeypatch.setenv("DPO_MODEL", str(folder))
    model, _ = helpers.load_model()
    run = train_dpo(helpers.add_lora(model.float()), tokenizer, *pairs, tmp_path / "run", **QUICK)
    trained = load_file(run.adapter / "adapter_model.safetensors")
    assert any("experts" in name and "lora_B" in name and weight.any() for name, weight in trained.items())
    merged = AutoModelForCausalLM.from_pretrained(export_run(run, "merged", tmp_path / "merged"), dtype=torch.float32)
    found = pair_logps(merged, tokenizer, pairs[1])
    for side in ("chosen", "rejected"):
        policy, reference = (run.held_out[f"{side}_{one}"].to_numpy() for one in ("policy", "reference"))
        assert getattr(found, side).numpy() == pytest.approx(policy, abs=5e-3)  # a CPU with bf16 rounds to 16 bits
        assert abs(policy - reference).max() > 0.1


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.slow
def test_settings_that_change_a_forward_change_the_key_of_the_cache(tokenizer):
    def key(**settings):
        model = tiny()
        vars(model.config).update(settings)
        return reference_file(model, tokenizer, "data", 512)

    plain = key()
    assert plain == key() == key(use_cache=False, pad_token_id=5)
    changed = [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ]
    assert len({plain, *(key(**settings) for settings in changed)}) == 1 + len(changed)
    model = get_peft_model(tiny(), LoraConfig(**LORA))
    assert config_hash(model) == config_hash(tiny())


def test_a_sliding_window_is_in_the_log_probs(tokenizer, pairs):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "initializer_range": 0.5}
    settings = {"kind": Qwen2ForCausalLM, "config": Qwen2Config, "vocab_size": len(tokenizer)}
    model = tiny(**settings, **window, attn_implementation="eager").eval()
    assert not can_share(model) and can_share(tiny(**settings))
    ids = helpers.tokenize_pairs(pairs[1], tokenizer)
    found = pair_logps(model, tokenizer, ids).chosen
    for row, logp in zip(ids, found, strict=True):
        whole, start = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            logps = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[start - 1 :].sum()
        assert logps.item() == pytest.approx(logp.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ damaged folders


@pytest.mark.parametrize("damage", ["missing", "cut short", "no config"])
def test_a_folder_that_is_damaged_is_answered(damage, tmp_path, tokenizer):
    folder = tmp_path / "mine [v2]"
    tiny(vocab_size=len(tokenizer)).save_pretrained(folder, max_shard_size="2MB")
    tokenizer.save_pretrained(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"The model in mine \[v2\] cannot be loaded \(.*copy the folder again"):
        helpers.load_model(str(folder))


def test_a_pad_token_beyond_the_embedding(tmp_path, short_tokenizer):
    tokenizer = copy.deepcopy(short_tokenizer)
    save(tmp_path / "mine", tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|mine|>"})
    tokenizer.save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match=r"'<\|mine\|>' with the number 1000.*1000 rows.*resize_token_embeddings"):
        helpers.load_model(str(tmp_path / "mine"))


def test_tokens_beyond_the_embedding(tokenizer, pairs):
    model = tiny(vocab_size=len(tokenizer) - 1000)
    rows = load_pairs([{"prompt": "Hi", "chosen": tokenizer.decode([len(tokenizer) - 5]), "rejected": "No."}])
    with pytest.raises(UserError, match=r"with the number 49147.*48152 rows"):
        pair_logps(model, tokenizer, rows)
    with pytest.raises(UserError, match=r"with the number 49147.*48152 rows"):
        helpers.generate_replies(model, tokenizer, [tokenizer.decode([len(tokenizer) - 5])], max_new_tokens=2)
    assert pair_logps(model, tokenizer, pairs[1].select([0])).chosen < 0


def test_a_folder_of_adapters_with_names_of_their_own(tmp_path, short_tokenizer, monkeypatch):
    folder, config = save(tmp_path / "base", short_tokenizer), LoraConfig(**LORA, init_lora_weights=False)
    monkeypatch.setenv("DPO_MODEL", str(folder))
    model, _ = helpers.load_model()
    saved = get_peft_model(model, config, adapter_name="mine")
    expected = {name.replace(".mine.", "."): one.clone() for name, one in saved.state_dict().items() if "lora" in name}
    saved.save_pretrained(tmp_path / "adapters")
    inside = tmp_path / "adapters" / "mine" / "adapter_config.json"
    inside.write_text(json.dumps(json.loads(inside.read_text()) | {"base_model_name_or_path": "base"}))
    loaded, _ = helpers.load_model(str(tmp_path / "adapters"))
    check_adapter(loaded)
    found = {name.replace(".default.", "."): one for name, one in loaded.state_dict().items() if "lora" in name}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())
    shutil.copytree(inside.parent, tmp_path / "adapters" / "other")
    with pytest.raises(UserError, match="adapters holds several adapters: mine, other"):
        helpers.load_model(str(tmp_path / "adapters"))


def test_an_adapter_that_does_not_fit_its_base(tmp_path, short_tokenizer, monkeypatch):
    folder = save(tmp_path / "mine", short_tokenizer)
    adapter = get_peft_model(tiny(vocab_size=64, hidden_size=32), LoraConfig(**LORA))
    adapter.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("DPO_MODEL", str(folder))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "mine"}))
    with pytest.raises(UserError, match="The model in adapter cannot be loaded.*size mismatch"):
        helpers.load_model(str(tmp_path / "adapter"))
