"""Loading a model and its tokenizer: pad token, chat template, LoRA, and the names that a run folder holds."""

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
from helpers.model import Model, Tokenizer, refusal
from helpers.model.embedded import EMBEDDED_HUB_NAME, EMBEDDED_PACKAGE, embedded_folder, embedded_model
from helpers.model.memory import is_out_of_memory, keep_freed_memory
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
    name, embedded, files = str(model.config.name_or_path), embedded_folder(), ["config.json", "model.safetensors"]
    if not Path(name).is_absolute():
        return name
    same = embedded and (Path(name) == embedded or filecmp.cmpfiles(name, embedded, files, shallow=False)[0] == files)
    return EMBEDDED_HUB_NAME if same else Path(name).name


def _base_named_by(folder: Path) -> str | None:
    """The base model that a LoRA adapter names; None if `folder` holds no adapter."""
    try:
        text = (folder / "adapter_config.json").read_text(encoding="utf-8")
        return str(json.loads(text).get("base_model_name_or_path"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise refusal("adapter config", folder=folder.name, reason=error) from error


def adapter_base(name: str) -> str | None:
    """The base model of a LoRA adapter folder that holds no path: the embedded one, or the folder in DPO_MODEL.

    None if `name` is no adapter, or if its base is a name on the hub, which Unsloth looks up itself. Raises UserError
    if adapter_config.json is no JSON, or if the base is in a folder that DPO_MODEL does not name.
    """
    base = _base_named_by(Path(name))
    if base is None or base == EMBEDDED_HUB_NAME:
        return base and embedded_model()
    folder = Path(_whole_path(base if "/" in base else setting("DPO_MODEL", base), PROJECT))
    if folder.is_absolute() and folder.name == Path(base).name:
        return str(folder)
    if "/" in base:
        return None
    raise refusal("base in a folder", folder=Path(name).name, base=base)


def not_found(name: str, error: Exception) -> UserError:
    """What to say if the model `name` cannot be loaded; `error` is what the library raised."""
    folder, kind = Path(name), type(error).__name__
    if "trust_remote_code" in str(error):
        return refusal("code", folder=folder.name)
    if any(folder.glob("pytorch_model*.bin")):
        return refusal("pickle", folder=folder.name)
    if folder.is_dir():
        reason, base = f"{kind}: {' '.join(str(error).split())[:300]}", _base_named_by(folder)
        return refusal("damaged adapter" if base else "damaged", folder=folder.name, reason=reason, base=base)
    if name == EMBEDDED_HUB_NAME:
        return refusal("embedded gone", package=EMBEDDED_PACKAGE, name=name)
    return refusal("not on the hub", name=name, kind=kind)


def _complete(model: Model | None, tokenizer: Tokenizer, chat_template: str | None, name: str) -> None:
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise refusal("no template", name=name)
    fix_pad_token(model, tokenizer)


def load_tokenizer(name: str | None = None, *, thinking: bool = False, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that `load_model` returns for this name, thinking and chat_template; raises UserError like it."""
    name = _model_name(name, thinking)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    _complete(None, tokenizer, chat_template, name)
    return tokenizer


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
    profile, options = current_profile(), {}
    if profile.name == "cpu":
        keep_freed_memory()
        # oneDNN would keep 1024 compiled kernels, some hundred megabytes: each length of a batch has some twenty.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        # The plain form takes the mask of shared_prompt as it is; short sequences gain nothing from a fused kernel.
        options["attn_implementation"] = "eager"
    name = _model_name(name, thinking)
    # PEFT saves an adapter that is not named "default" in a folder of its name.
    inside = sorted(path.parent for path in Path(name).glob("*/adapter_config.json"))
    if inside and not any((Path(name) / file).exists() for file in ("config.json", "adapter_config.json")):
        if len(inside) > 1:
            raise refusal("several adapters", folder=Path(name).name, names=", ".join(path.name for path in inside))
        name = str(inside[0])
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
            **options,
        )
        if base:
            loading = name
            model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise not_found(loading, error) from error
    _complete(model, tokenizer, chat_template, name)
    check_token(model, tokenizer, tokenizer.pad_token_id)
    # Some models bring a limit, and on a GPU Unsloth sets one; next to max_new_tokens each reply would warn of it.
    model.generation_config.max_length = None
    return model, tokenizer


def check_token(model: Model, tokenizer: Tokenizer, token: int) -> None:
    """Raise UserError if the `model` has no embedding for this `token` of the `tokenizer`."""
    rows = model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        raise refusal("no row", text=tokenizer.convert_ids_to_tokens(token), token=token, rows=rows)


def fix_pad_token(model: Model | None, tokenizer: Tokenizer) -> None:
    """Make tokenizer and model agree on a pad token, in place: the tokenizer's own, or its EOS if it has none.

    Padding with EOS is safe in DPO: TRL masks by each row's length, not by the pad id, so a completion's own EOS stays
    in the loss. `model` may be None. Raises UserError if the tokenizer has neither token.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise refusal("no end")
        tokenizer.pad_token = tokenizer.eos_token
    if model is not None:
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def add_lora(
    model: PreTrainedModel, *, rank: int = 16, seed: int = 0, target_modules: Sequence[str] | str = LORA_TARGETS
) -> PeftModel:
    """Add a fresh LoRA adapter on the seven projections (Hu et al. 2021, arXiv:2106.09685); only it is trained.

    alpha = rank, so the adapter's update is scaled by 1; dropout 0, which Unsloth's fast path asks for. The A matrices
    are drawn with `seed`, the B matrices start at zero, so the policy starts equal to the base `model`, which is
    changed in place: `model = add_lora(model)`. Twice the `rank` is twice the trained parameters. `target_modules` are
    the layers' names, for architectures in which they differ, or one string as PEFT takes it: "all-linear", or a
    regular expression for a layer's whole name. Raises UserError if there are none.
    """

    def names_of(inside: PreTrainedModel | PeftModel, *kinds: type) -> set[str]:
        return {name.rpartition(".")[2] for name, layer in inside.named_modules() if isinstance(layer, kinds)}

    names, pattern = names_of(model, Linear, Conv1D), target_modules if isinstance(target_modules, str) else None
    wanted = [] if pattern else list(target_modules)
    try:
        policy = FastLanguageModel.get_peft_model(
            model,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0,
            target_modules=pattern or wanted,
            bias="none",
            use_gradient_checkpointing=current_profile().name == "gpu",
            random_state=seed,
        )
    except ValueError as error:
        layers = ", ".join(sorted(names - {"lm_head"}))
        raise refusal("other layers", targets=pattern or ", ".join(wanted), reason=error, layers=layers) from error
    if missing := set(wanted) - names:
        found = names_of(policy, LoraLayer) - {"base_layer"}
        print(f"The model has no layers {', '.join(sorted(missing))}; LoRA is on {', '.join(sorted(found))}.")
    return policy
