"""The run folder: what a training run leaves, its figures and its model card."""
