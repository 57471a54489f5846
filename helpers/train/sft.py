"""Supervised fine-tuning (SFT), a start for DPO: that only shifts what the reference already says at times."""

import tempfile

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from helpers.patches.fused_lm_head import own_forward
from helpers.session import quiet_progress
from helpers.train.settings import dpo_settings
from helpers.train.trainer import text_progress

# Of `dpo_settings`. Its learning rate and batch are those of DPO.
_SHARED = """lr_scheduler_type warmup_steps weight_decay optim gradient_checkpointing bf16 fp16 num_train_epochs
logging_steps logging_first_step report_to""".split()


def train_sft(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, *, learning_rate: float, seed: int = 0
) -> list[float]:
    """Train the model's adapter on prompt and chosen side of each pair, once through, the loss on the reply alone.

    It is changed in place, so a `train_dpo` after it takes the SFT model as its reference. Returns the logged losses,
    in nats per token.

    Args:
        model, tokenizer: with a LoRA adapter (`add_lora`), and its tokenizer.
        pairs: in the form that `load_pairs` gives; the rejected sides are not used.
        learning_rate: at its highest, after warm-up.
        seed: of the order of the pairs.
    """
    settings = {name: value for name, value in dpo_settings(model).items() if name in _SHARED}
    settings |= {"learning_rate": learning_rate, "seed": seed, "per_device_train_batch_size": 8}
    columns = [name for name in ("prompt", "chosen", "tools", "chat_template_kwargs") if name in pairs.column_names]
    data = pairs.select_columns(columns).rename_column("chosen", "completion")
    with (
        tempfile.TemporaryDirectory() as folder,
        quiet_progress(len(data)),
        own_forward(model),
        own_forward(model.get_base_model()),
    ):
        config = SFTConfig(output_dir=folder, save_strategy="no", disable_tqdm=True, **settings)
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        text_progress(trainer)
        trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
