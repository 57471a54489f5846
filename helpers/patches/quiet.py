"""Warnings that a reader can't act on, silenced by the name of the logger that gives them.

torchao registers two enums in a way that torch 2.14 calls deprecated, bitsandbytes looks for an optional package of
CPU kernels, and on a GPU Unsloth says of each tokenizer it saves, with its path, that it mended its own omission. None
of them changes a result. Loggers are named after private modules, so a module that moves is heard again.
"""

import logging
import sys

from helpers.patches import expect

_IMPORTS = {"torch.utils._pytree": "log", "bitsandbytes.backends.cpu.ops": "logger"}  # module: its logger
_SAVING = "transformers.models.llama.modeling_llama"


def self_test() -> None:
    """The modules still have the loggers that are silenced. Those that were not imported are not asked."""
    for name, logger in (*_IMPORTS.items(), (_SAVING, "logger")):
        if name in sys.modules:
            found = getattr(sys.modules[name], logger).name
            expect(found == name, f"the logger of {name} is {found}")
    expect("torch.utils._pytree" in sys.modules or "torch" not in sys.modules, "torch.utils._pytree has moved")


def quiet_libraries() -> None:
    """Silence what torchao and bitsandbytes log when they are imported, and Unsloth about each saved tokenizer."""
    for name in _IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(_SAVING).addFilter(lambda record: "Restored added_tokens_decoder" not in record.getMessage())
