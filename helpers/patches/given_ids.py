"""A DPOTrainer that trains on the token ids it is given, which are those that were checked.

TRL tokenises messages itself, and has no switch for data that has its ids already. Its `_prepare_dataset` is where it
does so; the columns that it leaves are what its collator reads.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import trl
from datasets import Dataset

from helpers.patches import expect, works

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def self_test() -> None:
    """The trainer prepares its data by `_prepare_dataset`, and what it keeps and collates are the columns of ids."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer, stub = trl.DPOTrainer, SimpleNamespace(_signature_columns=None, _is_vision_dataset=False)
    parameters = list(inspect.signature(trainer._prepare_dataset).parameters)  # noqa: SLF001  (what is tested)
    expect(parameters[:2] == ["self", "dataset"], f"_prepare_dataset takes {parameters}")
    steps = [inspect.unwrap(one.__init__) for one in trainer.__mro__]
    called = {name for step in steps if hasattr(step, "__code__") for name in step.__code__.co_names}
    expect("_prepare_dataset" in called, "DPOTrainer does not call _prepare_dataset when it is made")
    trainer._set_signature_columns_if_needed(stub)  # noqa: SLF001  (what is tested)
    expect(set(ID_COLUMNS) <= set(stub._signature_columns), "DPOTrainer keeps other columns")  # noqa: SLF001  (as above)
    row = dict(zip(ID_COLUMNS, ([1], [2, 3], [4]), strict=True))
    batch = DataCollatorForPreference(pad_token_id=0)([row])
    expect(batch["input_ids"].tolist() == [[1, 2, 3], [1, 4, 0]], "the collator reads other columns")


def trainer_class() -> type[trl.DPOTrainer]:
    """TRL's DPOTrainer, but a dataset that has its token ids already is taken as it is.

    Looked up when called: on a GPU Unsloth puts a class of its own into TRL.
    """
    own = trl.DPOTrainer
    if not works("given_ids"):
        return own

    def prepare(self: trl.DPOTrainer, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        given = set(ID_COLUMNS) <= set(dataset.column_names or ())
        return dataset if given else own._prepare_dataset(self, dataset, *args, **kwargs)  # noqa: SLF001  (the patch)

    # Under TRL's name, which it puts into model cards.
    return type(own.__name__, (own,), {"_prepare_dataset": prepare, "__doc__": own.__doc__})
