"""The run folder: what a training run leaves, what is wrong with it, keep it or discard it, its model card."""

from pathlib import Path

from helpers.common import errors_of

refused = errors_of(Path(__file__).with_name("refused.yaml"))
