"""A DPOTrainer that reads the reference's log-probs from the data, where they were put before it was made.

TRL reads the columns `ref_chosen_logps` and `ref_rejected_logps` only if it is told to compute them itself
(`precompute_ref_log_probs`), and its own cache changes with every setting. The attribute that decides is set once the
trainer is made.
"""

import contextlib
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import trl

from helpers.patches import expect


def self_test() -> None:
    """The loss reads the columns if `precompute_ref_logps` is set, and not if it isn't; what follows is not run."""
    loss, columns = trl.DPOTrainer._compute_loss, {"ref_chosen_logps", "ref_rejected_logps"}  # noqa: SLF001  (tested)
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    batch = {"input_ids": ids, "attention_mask": ids > 0, "completion_mask": ids > 2}
    batch |= dict.fromkeys(columns, torch.zeros(1))
    for on in (True, False):
        inputs = MagicMock()  # keeps what is looked up in it
        inputs.__getitem__.side_effect = batch.__getitem__
        trainer = MagicMock(precompute_ref_logps=on, ld_alpha=None, aux_loss_enabled=False)
        model = MagicMock(return_value=SimpleNamespace(log_probs=torch.zeros(2, 2)))
        with contextlib.suppress(Exception):  # a stub does not get to the end
            loss(trainer, model, inputs, False)
        names = {call.args[0] for call in inputs.__getitem__.call_args_list}
        expect((names >= columns) == on, f"with precompute_ref_logps={on} the loss reads {names}")


def use_cached_reference(trainer: trl.DPOTrainer) -> None:
    """Have `trainer` read the reference's log-probs from its data. Before it is made, ask `works`."""
    trainer.precompute_ref_logps = True
