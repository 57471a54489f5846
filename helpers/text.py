"""Showing text of data sets, models and file names, which may hold anything.

What a table or a message shows goes through `visible`: control characters, writing direction and length can do no harm.
"""

import re


def visible(text: str, limit: int = 1000) -> str:
    """Text that can do no harm on a screen: what is no printable character becomes its escape, long text is cut.

    Escape codes of terminals and marks that turn the writing direction are shown (`\\x1b`, `\\u202e`), a line break
    becomes an arrow, and a word of more than 80 characters is shortened. Tags stay as they are: what shows a table
    as HTML (pandas does) escapes them.

    Args:
        text: of a data set or a model.
        limit: characters that are kept.
    """
    text = re.sub(r"\S{81,}", lambda word: f"{word[0][:60]}... ({len(word[0])} characters)", text)
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text)} characters)"
    text = re.sub(r"[^\S\n]", " ", text).replace("\n", "\u21b5 ")  # other spaces are no "printable" ones for Python
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
