"""What tests share: one tokenizer, one loaded model, a clean environment."""

import os

import pytest

# Settings of the person who runs the tests must not change their outcome. The cache folder stays: the embedded
# model is converted once, not once a run.
for name in ("DPO_PROFILE", "DPO_MODEL", "DPO_THINKING_MODEL", "DPO_DATA", "DPO_OUTPUT_DIR"):
    os.environ[name] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import helpers  # noqa: E402
from helpers.train.trainer import make_trainer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    return helpers.load_tokenizer("embedded")


@pytest.fixture(scope="session")
def base():
    """(model, tokenizer) of the embedded model, loaded once; tests that train it must `unload()` their adapter."""
    return helpers.load_model("embedded")


@pytest.fixture
def with_callback(monkeypatch):
    """A function that gives a callback to every trainer that `train_dpo` makes afterwards; None takes it away again."""
    real = make_trainer

    def give(callback) -> None:
        def make(*args):
            trainer = real(*args)
            trainer.add_callback(callback)
            return trainer

        monkeypatch.setattr("helpers.train.dpo.make_trainer", real if callback is None else make)

    return give
