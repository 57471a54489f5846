"""A run.json, for tests of what is made from one."""

import copy

import pytest

# As version 1 wrote it: a finished run of 03_train, of whose 131 settings three are left.
FIRST = {
    "status": "finished",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "profile": "cpu",
    "config": {"beta": 0.1, "max_length": 512, "seed": 0},
    "steps": 24,
    "train_pairs": 192,
    "test_pairs": 120,
    "data": {"train": "3d09f714980574a1daab", "test": "f82342fc5a28ded3a9e7", "findings": {"over_max_length": 2}},
    "base": "cb000db86ce8f0e961d4",
    "start": "a3591da504ca338d23ac",
    "reference": "the policy at its start",
    "versions": {"python": "3.11.7", "torch": "2.14.1", "trl": "1.15.0"},
    "machine": "CPU x86_64, 2 threads",
    "memory_gb": {"needed": 1.36, "free": 22.83},
    "end": "2333e03ca94c0ff5c989",
    "lora": {"adapter": {"r": 16, "lora_alpha": 16, "use_rslora": False}},
}


@pytest.fixture
def first():
    """What version 1 wrote into run.json, to be changed."""
    return copy.deepcopy(FIRST)
