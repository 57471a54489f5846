"""Handing a finished run over: its adapter, the merged model, a GGUF file, or the run itself for more GPUs."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from helpers.after import refused
from helpers.after.inspection import check_files, compare_base, load_policy
from helpers.common import setting, why_not_written
from helpers.data.check import check_pairs
from helpers.data.render import template_options
from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.load import CHATML, LORA_TARGETS, adapter_base, load_model, load_tokenizer, not_found
from helpers.model.memory import pairs_a_step
from helpers.model.profiles import EMBEDDED, PROFILES
from helpers.patches.llama_cpp import converter_places
from helpers.run.card import TEMPLATES, changed_settings, model_card
from helpers.run.folder import POLICY_AT_START, Run, set_aside
from helpers.train.job import hash_without_date
from helpers.train.settings import RUN_SETTINGS, dpo_settings


def export_run(
    run: Run | str | Path,
    to: str,
    folder: str | Path,
    *,
    train: Dataset | None = None,
    test: Dataset | None = None,
    hub: str | None = None,
    replace: bool = False,
) -> Path:
    """Write what a finished `run` hands over into `folder`, which appears whole or not at all; returns `folder`.

    It holds a model card, no path of this machine and no token.

    Args:
        to: "adapter": the LoRA weights and the tokenizer (tens of MB), for PEFT or vLLM on top of the base model.
            "merged": an ordinary model in float16, which needs neither PEFT nor this project. The card says how much
            of the update the rounding keeps; below 90% it is printed too. A 4-bit base is de-quantised, not replaced
            by its 16-bit original, on which nothing was trained. Nothing is downloaded.
            "gguf": the merged model as one 8-bit file (q8_0), if llama.cpp's converter is on this machine.
            "torchrun": settings, pairs and a start script with which `train_dpo` repeats the run on several GPUs.
            "trl": the same with TRL's script, for those without this package; on GPUs several times slower.
        train, test: for the last two: the pairs that were given to `train_dpo`, compared with the run's by their hash.
        hub: a repository on the hub (OWNER/NAME) to which the folder is also uploaded; a new one is made private.
        replace: write even if `folder` exists. An old export is removed if it is as it was written; a folder that holds
            anything else (your notes, a card that you edited, what was trained there) is kept next to the new one as
            `NAME.old-1` and so on.

    Raises UserError for another `to`, a folder that exists, a base model or a converter that is not here, other pairs,
    a run that a script can't repeat, no token, a refusal by the hub, no room on the disk.
    """
    folder, scripts = Path(folder).expanduser().resolve(), to in ("torchrun", "trl")
    run = run if isinstance(run, Run) else Run.load(run)
    if to not in list(_WRITERS):
        raise refused("form", to=to, forms=", ".join(map(repr, _WRITERS)))
    if folder.exists() and not replace:
        raise refused("exists", folder=folder.name)
    if hub is not None and scripts:
        raise refused("hub_of_pairs", to=to)
    if hub is not None and setting("HF_TOKEN") is None:
        raise refused("token", hub=hub)
    check_files(run)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        part.mkdir(parents=True)
        kept = _WRITERS[to](run, part)
        if scripts:
            _write_pairs(run, part, train, test)
        else:
            (part / "README.md").write_text(model_card(run, to, kept), encoding="utf-8")
        card = (part / "README.md").read_bytes()
        (part / "README.md").write_bytes(card + _mark(part, card))
        if folder.exists():
            (shutil.rmtree if _is_as_exported(folder) else set_aside)(folder)
        part.rename(folder)
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        raise refused("disk", folder=folder.name, error=reason) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if hub is not None:
        _upload(folder, hub)
    return folder


def _mark(folder: Path, card: bytes) -> bytes:
    """The last line of an export's README.md, which no page shows: a hash of the `card` and of what is next to it."""
    digest = hashlib.sha256(card)
    for path in sorted(folder.rglob("*")):
        digest.update(f"\n{path.relative_to(folder).as_posix()} ".encode())
        if path.is_file() and path != folder / "README.md":
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"\n<!-- export_run: {digest.hexdigest()[:20]} -->\n".encode()


def _is_as_exported(folder: Path) -> bool:
    """Whether `folder` holds an export in which nothing was changed."""
    file = folder / "README.md"
    card, *mark = file.read_bytes().rpartition(b"\n<!-- export_run: ") if file.is_file() else (b"",)
    return b"".join(mark) == _mark(folder, card)


def _upload(folder: Path, name: str) -> None:
    hub = HfApi(token=setting("HF_TOKEN"))
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"{type(error).__name__}{f', status {status}' if status else ''}"
        raise refused("hub", name=name, error=said, folder=folder.name) from None  # its text may quote the request


def _check_base(run: Run) -> None:
    """Raise UserError unless the base that is here is the one that `run` was trained on."""
    with contextlib.redirect_stdout(io.StringIO()):  # Unsloth says how it loads it
        model, _ = load_model(_base_of(run), chat_template=CHATML)  # whose own may be in the run alone
    compare_base(run, model)


def _write_adapter(run: Run, part: Path) -> None:
    _check_base(run)
    shutil.copytree(run.adapter, part, dirs_exist_ok=True)


def _base_of(run: Run) -> str:
    """Where its base model is: the embedded one's folder, that of DPO_MODEL, or a name on the hub."""
    return adapter_base(str(run.adapter)) or run.info.model


def kept_update(model: PeftModel, dtype: torch.dtype = torch.float16) -> float:
    """How much of an adapter's update is left when the merged weights of `model` are rounded to `dtype`.

    For weights W and updates D of all layers, the part of the rounded change that lies along D: (round(W + D) - W)·D /
    D·D. 1 if nothing is lost, 0 if every weight rounds back to what it was.
    """
    # Imported here: PEFT may move them, and the other exports do without.
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    kept = whole = 0.0
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                fused = hasattr(layer, "get_param")  # experts in one tensor; the others: unchanged if not in 4-bit
                weight = (layer.get_param() if fused else dequantize_module_weight(layer.base_layer)).float()
                update = layer.get_delta_weight("default").float()
                kept += ((weight + update).to(dtype).float() - weight).mul(update).sum().item()
                whole += update.square().sum().item()
    return kept / whole if whole else 1.0


def merged_model(run: Run) -> tuple[PreTrainedModel, float]:
    """(model, kept): the base model of `run` in float16, the adapter added into its weights, and `kept_update` of it.

    float16, not bfloat16, in which most base models are stored: an update is small compared with its weight, and
    bfloat16's coarser steps (8 significant bits, not 11) would round much of it away. A 4-bit base is loaded as it was
    trained on and de-quantised first: added to 4-bit weights, the adapter would be rounded to 4 bits too.
    """
    base, four_bit = _base_of(run), None
    if PROFILES[run.info.profile].load_in_4bit:  # as Unsloth loads it; a model that is stored in 4-bit keeps its own
        nf4 = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": torch.float16}
        four_bit = BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{name}": value for name, value in nf4.items()})
    safe = {"token": setting("HF_TOKEN"), "use_safetensors": True, "trust_remote_code": False}  # as load_model does
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16, quantization_config=four_bit, **safe)
    except (OSError, ValueError) as error:
        if Path(base).exists():
            raise
        raise not_found(base, error) from error
    if four_bit is not None:
        model = model.dequantize(torch.float16)
    model = PeftModel.from_pretrained(model, run.adapter)
    kept = kept_update(model)
    try:
        return model.merge_and_unload(safe_merge=True), kept
    except ValueError as error:
        raise refused("no_numbers", error=error) from error
    except RuntimeError as error:  # PEFT cannot merge each kind of LoRA
        raise refused("no_merge", error=error) from error


def _write_merged(run: Run, part: Path) -> float:
    load_policy(run)  # raises UserError as `_check_base` does, and if the adapter cannot be loaded
    model, kept = merged_model(run)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # transformers would not save it; the form "adapter" leaves it to the base
        own = model.generation_config
        model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        print("The base model's generation_config.json has settings that contradict each other; they are left out.")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False).save_pretrained(part)
    if kept < 0.9:
        print(
            f"Rounded to float16, the weights keep {kept:.0%} of the adapter's update: after few steps or with a small "
            'learning rate much of it is less than half of a weight\'s last digit. The form "adapter" keeps all.'
        )
    return kept


def _write_gguf(run: Run, part: Path) -> float:
    folder, names = converter_places()
    converter = next((folder / name for name in names if (folder / name).is_file()), None)
    if converter is None:
        raise refused("no_converter")
    merged = part / "merged"
    kept = _write_merged(run, merged)
    command = [sys.executable, converter, merged, "--outfile", part / "model-q8_0.gguf", "--outtype", "q8_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])
        if (full := os.strerror(errno.ENOSPC)) in last:
            raise OSError(errno.ENOSPC, full)
        raise refused("converter", last=last)
    shutil.rmtree(merged)
    return kept


def _write_pairs(run: Run, part: Path, train: Dataset | None, test: Dataset | None) -> None:
    """Write the pairs as the run trained on them. Raises UserError if they are others."""
    if train is None or test is None:
        raise refused("no_pairs")
    tokenizer, longest = load_tokenizer(_base_of(run)), run.info.config["max_length"]
    reports = {
        name: check_pairs(given, tokenizer, longest, test=other, **run.info.prompts_rule)
        for name, given, other in (("train", train, test), ("test", test, None))
    }
    dated = hash_without_date(*reports.values(), tokenizer)
    (part / "data").mkdir()
    for name, report in reports.items():
        if report.hash != getattr(run.info.data, name) and (not dated or dated != run.info.data.given):
            counts = {"here": len(report.pairs), "there": run.info[f"{name}_pairs"]}
            raise refused("other_pairs", name=name, run=run.folder.name, **counts)
        (part / "data" / f"{name}.jsonl").write_text(_json_lines(report.pairs), encoding="utf-8")


def _json_lines(pairs: Dataset) -> str:
    """The pairs as TRL's script reads them, with what each row passes to the chat template.

    Tools are written as JSON text: as objects, datasets would give each row the keys of all others.
    """
    rows = []
    for row in pairs:
        options = template_options(row)
        tools = options.pop("tools", None)
        own = {"tools": json.dumps(tools) if tools else None, "chat_template_kwargs": options}
        rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")} | own)
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    return "".join(json.dumps({name: row[name] for name in used}, ensure_ascii=False) + "\n" for row in rows)


def _write_torchrun(run: Run, part: Path) -> None:
    info, config = run.info, run.info.config
    if info.reference != POLICY_AT_START:
        raise refused("no_script")
    lora = _lora(run)
    if run.reference is not None:
        shutil.copytree(run.reference, part / "reference")
    elif lora["lora_alpha"] != lora["r"] or set(_targets(lora)) != set(LORA_TARGETS) or _more(lora, *_TOLD):
        raise refused("other_lora")
    own = {"model": EMBEDDED if info.model == EMBEDDED_HUB_NAME else info.model, "lora_rank": lora["r"]}
    names = changed_settings(config).keys() | dpo_settings().keys() | RUN_SETTINGS.keys()
    settings = {name: config[name] for name in sorted(names - {"report_to"}) if config[name] is not None}
    _write_script(run, part, "torchrun", own | {"folder": "run"} | info.prompts_rule | settings)


def _write_trl(run: Run, part: Path) -> None:
    info, config = run.info, run.info.config
    if run.reference is not None or info.reference != POLICY_AT_START:
        raise refused("trl_reference")
    lora = _lora(run)
    if more := _more(lora):
        raise refused("trl_lora", names=", ".join(more))
    settings = changed_settings(config) | {
        "model_name_or_path": info.model,
        "dtype": "bfloat16" if config["bf16"] else "float16" if config["fp16"] else "float32",
        "precompute_ref_log_probs": True,  # the reference's forward once, as in the run, and not in each step
    }
    settings |= {"use_peft": True, "lora_r": lora["r"], "lora_target_modules": _targets(lora)}
    settings |= {name: lora[name] for name in ("lora_alpha", "lora_dropout")}
    settings |= {there: lora[here] for here, there in _TOLD.items() if there not in settings and lora.get(here)}
    more = f", on a CPU also unsloth=={info.versions['unsloth']}"
    if PROFILES[info.profile].load_in_4bit:
        # On a large card the run may have needed no checkpointing; TRL alone needs more memory than Unsloth.
        settings |= {"load_in_4bit": True, "use_bnb_nested_quant": True, "gradient_checkpointing": True}
        more = " and bitsandbytes"
    shutil.copy(TEMPLATES / "fsdp.yaml", part)
    rounded = " from the hub, whose weights were never rounded to 4 bits and\n  differ a little from the run's"
    note = rounded if info.model == EMBEDDED_HUB_NAME else ""
    _write_script(run, part, "trl", dict(sorted(settings.items())), more=more, model_note=note)


# Settings of an adapter besides its size and places: those that TRL's script takes, by its name for them, and others.
_TOLD = {name: name for name in ("use_rslora", "use_dora", "lora_dropout")}
_TOLD |= {"modules_to_save": "lora_modules_to_save"}
_NOT_TOLD = (
    "alpha_pattern exclude_modules layers_to_transform lora_bias rank_pattern trainable_token_indices use_qalora"
)
# PEFT puts LoRA on experts in one tensor where it is asked for these layers, and twice the rank on the first.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _targets(lora: dict[str, Any]) -> list[str]:
    """The names of layers, or a pattern for them, with which PEFT makes this adapter."""
    names = lora["target_modules"]
    fused = (_FUSED.get(name, (name,)) for name in lora.get("target_parameters") or ())
    return sorted({*([names] if isinstance(names, str) else names), *itertools.chain(*fused)})


def _more(lora: dict[str, Any], *others: str) -> list[str]:
    """Which settings the adapter has that a script is not given; `others` are asked about too."""
    made = {f".*\\.{name}" for name in lora.get("target_parameters") or ()}  # patterns of PEFT's own
    found = {name: lora.get(name) for name in [*_NOT_TOLD.split(), *others]}
    return [name for name, value in found.items() if value and not (isinstance(value, dict) and value.keys() <= made)]


def _lora(run: Run) -> dict[str, Any]:
    return json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))


def _write_script(run: Run, part: Path, form: str, settings: dict[str, Any], **values: str) -> None:
    """Put the script of this `form` and its settings into the folder, and a README with these `values`."""
    _check_base(run)
    shutil.copy(Path(__file__).with_name(f"{form}_script.py"), part / "train.py")
    readme = (TEMPLATES / f"{form}_export.md").read_text(encoding="utf-8")
    readme = readme.format(run=run, batch=pairs_a_step(run.info.config), **values)
    (part / "README.md").write_text(readme, encoding="utf-8")
    name = {"trl": "dpo.yaml", "torchrun": "settings.yaml"}[form]
    (part / name).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


_WRITERS: dict[str, Callable[[Run, Path], float | None]] = {"adapter": _write_adapter, "merged": _write_merged}
_WRITERS |= {"gguf": _write_gguf, "torchrun": _write_torchrun, "trl": _write_trl}
