"""A name for the contents of a dataset that is kept on disk, so that what was computed from it can be read again.

`datasets` keeps one for its own cache, in `_fingerprint`. A hash of all rows would take as long as what it saves.
"""

from datasets import Dataset

from helpers.patches import expect, works


def self_test() -> None:
    """The fingerprint is text, the same for the same contents, another one for others."""
    names = [Dataset.from_dict({"a": [number]})._fingerprint for number in (1, 1, 2)]  # noqa: SLF001  (what is tested)
    expect(all(isinstance(name, str) and name for name in names), "the fingerprint of a dataset is no text")
    expect(names[0] == names[1] != names[2], "the fingerprint of a dataset does not follow its contents")


def dataset_key(dataset: Dataset) -> str | None:
    """A name that changes with the contents of `dataset`; None if it is only in memory, or if there is no such name."""
    if not dataset.cache_files or not works("dataset_key"):
        return None
    return dataset._fingerprint  # noqa: SLF001  (the patch)
