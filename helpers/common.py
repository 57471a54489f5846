"""What every wing needs. Nothing heavy is imported here, so that `helpers.session` can set the order of imports."""

import errno
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from platformdirs import user_cache_dir

if TYPE_CHECKING:
    import pandas as pd

PROJECT = Path(__file__).parent.parent  # relative paths in .env start here, wherever a notebook runs


class UserError(ValueError):
    """A mistake that we could foresee in a setting, a file or a model; its text names the cure."""


def documents(module: str, name: str) -> list[Any]:
    """The documents of the YAML file `name` in the folder of a `module`, which passes its `__file__`."""
    return list(yaml.safe_load_all(Path(module).with_name(name).read_text("utf-8")))


def errors_of(module: str, name: str) -> Callable[..., UserError]:
    """A function that makes the error with a text of a `module`'s file `name`, by its name and what its braces want."""
    (texts,) = documents(module, name)
    return lambda name, /, **values: UserError(texts[name].format(**values))


def write_atomic(path: Path, write: Callable[[str], object]) -> None:
    """Call `write(temporary_path)`, then rename to `path`: a reader sees the old file or the new, never half of one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(part)
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value that JSON can hold to `path`, by `write_atomic`."""
    write_atomic(path, lambda part: Path(part).write_text(json.dumps(value, indent=1), encoding="utf-8"))


def file_hash(path: Path) -> str:
    """20 hex digits of what the file at `path` holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


_CUT_SHORT = "inline_container|iostream error"  # torch.save, in two places


def why_not_written(error: BaseException) -> str | None:
    """The system's words for why a file was not written; None if `error` is about something else.

    safetensors and tokenizers put them into exceptions of their own, shutil into a list of paths. torch.save says
    nothing if a file was cut short: the disk is full.
    """
    text = "" if isinstance(error, UserError) else str(error)
    if re.search(_CUT_SHORT, text):
        return os.strerror(errno.ENOSPC)
    if re.search(r" \(os error \d", text):
        return text.partition(" (os error ")[0].rpartition(": ")[2]
    if not isinstance(error, OSError):
        return None
    if number := re.search(r"\[Errno (\d+)\]", text):
        return os.strerror(int(number[1]))
    return error.strerror or text or type(error).__name__


def visible(text: str, limit: int = 1000) -> str:
    """`text` that can do no harm on a screen: at most `limit` characters, those that don't print as escapes.

    A line break becomes an arrow, a word of more than 80 characters is shortened, tags stay (pandas escapes them).
    """
    text = re.sub(r"\S{81,}", lambda word: f"{word[0][:60]}... ({len(word[0])} characters)", text)
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text)} characters)"
    text = re.sub(r"[^\S\n]", " ", text).replace("\n", "\u21b5 ")  # other spaces are no "printable" ones for Python
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def html_table(table: "pd.DataFrame", *, index: bool = True) -> str:
    """The `table` for reading: texts in full, to the left and with their line breaks; numbers to the right, fractions
    with two digits; with the labels of its rows unless `index` is False. Nothing in it is taken for HTML or a formula.
    """

    def cell(kind: str, value: Any, side: str = "left") -> str:
        text = html.escape(f"{value:.2f}" if isinstance(value, float) and side == "right" else str(value), quote=False)
        return f'<{kind} style="text-align:{side};vertical-align:top;white-space:pre-wrap">{text}</{kind}>'

    sides = ["right" if dtype.kind in "biuf" else "left" for dtype in table.dtypes]
    lines = [[cell("th", "")] * index + [cell("th", *one) for one in zip(table.columns, sides, strict=True)]]
    for label, *values in table.itertuples(name=None):
        lines.append([cell("th", label)] * index + [cell("td", *one) for one in zip(values, sides, strict=True)])
    rows = "".join(f"<tr>{''.join(line)}</tr>\n" for line in lines)
    return f'<table class="tex2jax_ignore mathjax_ignore">\n{rows}</table>'  # or `$5 and $6` becomes a formula


def setting(name: str, default: str | None = None) -> Any:  # text, or None
    """The setting `name` from the environment or `.env`, else `default`; an empty one counts as not set."""
    return os.environ.get(name, "").strip() or default


def cache_folder() -> Path:
    """Where converted models and cached results are kept: `DPO_CACHE_DIR`, else the user's cache folder."""
    return PROJECT / Path(setting("DPO_CACHE_DIR") or user_cache_dir("dpo-notebooks")).expanduser()


def output_folder(*parts: str) -> Path:
    """The path (nothing is made) of a folder below `DPO_OUTPUT_DIR`, or `outputs`; `parts` are e.g. "sweep", "a"."""
    return PROJECT.joinpath(Path(setting("DPO_OUTPUT_DIR", "outputs")).expanduser(), *parts)
