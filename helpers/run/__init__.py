"""The run folder: what a training run leaves, what is wrong with it, keep it or discard it, its model card."""

from helpers.common import errors_of

unreadable = errors_of(__file__, "unreadable.yaml")
