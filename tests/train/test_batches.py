"""The batch that is fetched before it is asked for; on a GPU every run has it, here a Trainer of one number."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.train.trainer import _BatchAhead  # private: what makes it worth having is not seen from outside

ROWS = [{"x": torch.tensor([float(number)])} for number in range(11)]


class _Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.slope * x - 1).square().mean()}


def trained(folder, ahead: bool, resume: bool = False) -> tuple[list, list]:
    """(batches in the order of training, ("fetched" | "updated") as it happened) of two epochs of 2 + 2 + 2 steps."""
    batches, events = [], []

    class Mine(Trainer):
        def training_step(self, model, inputs, *more, **options):
            batches.append(inputs["x"].flatten().tolist())
            return super().training_step(model, inputs, *more, **options)

    class Update(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            events.append("updated")

    def collate(rows):
        events.append("fetched")
        return {"x": torch.stack([row["x"] for row in rows])}

    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Mine(_Line(), args, train_dataset=ROWS, data_collator=collate)
    if ahead:
        trainer.add_callback(_BatchAhead(trainer))
    trainer.add_callback(Update())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return batches, events


@pytest.mark.slow
def test_batches_and_their_order_stay_the_same_also_after_a_resume(tmp_path):
    plain, late = trained(tmp_path / "plain", ahead=False)
    ahead, early = trained(tmp_path / "ahead", ahead=True)
    assert ahead == plain and len(plain) == 12
    assert sorted(early) == sorted(late) and early != late
    # Three batches are fetched before the first update (accelerate looks one ahead), and one more if that is early.
    assert late.index("updated") == 3 and early.index("updated") == 4
    assert trained(tmp_path / "ahead", ahead=True, resume=True)[0] == plain[4:]
