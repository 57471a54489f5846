"""The run folder: what a training run leaves, and all that passes between the notebooks."""
