"""Start `train_dpo` on the run in this folder, in as many processes as torchrun starts:

    torchrun --nproc_per_node 2 train.py
    torchrun --nproc_per_node 2 train.py num_train_epochs=2 folder=longer

`export_run(..., "torchrun")` puts this file next to `settings.yaml`, whose values can be given anew as NAME=VALUE.
"""

if __name__ == "__main__":
    import contextlib
    import json
    import os
    import sys
    from pathlib import Path

    import yaml

    from helpers import add_lora, load_model, load_pairs, train_dpo

    here = Path(__file__).resolve().parent
    settings = yaml.safe_load((here / "settings.yaml").read_text(encoding="utf-8"))
    for name, _, value in (given.partition("=") for given in sys.argv[1:]):
        settings[name] = value
        with contextlib.suppress(ValueError):  # a text
            settings[name] = json.loads(value)
    name = settings.pop("model")  # a folder has no path here; DPO_MODEL says where it is
    model, tokenizer = load_model(None if name == Path(os.environ.get("DPO_MODEL", "")).name else name)
    rank, start = settings.pop("lora_rank"), here / "reference"
    if start.is_dir():  # the run went on from a trained adapter
        model, _ = load_model(str(start))
    else:
        model = add_lora(model, rank=rank)
    train, test = (load_pairs(here / "data" / f"{name}.jsonl") for name in ("train", "test"))
    train_dpo(model, tokenizer, train, test, here / settings.pop("folder"), **settings)
