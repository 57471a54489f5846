"""Training: settings, trainer, resume, `train_dpo`; a start by SFT; a sweep over beta."""
