"""The state of each patch: python -m helpers.patches. Exit code 1 if one is broken."""

import sys

from helpers.patches import PATCHES, fault


def show_state() -> bool:
    """Print one line a patch, and for a broken one what happens without it; returns whether all work."""
    faults = {name: fault(name) for name in PATCHES}
    for name, reason in faults.items():
        print(f"{name:22}  {'works' if reason is None else f'broken ({reason}). {PATCHES[name]}'}")
    return not any(faults.values())


if __name__ == "__main__":
    sys.exit(0 if show_state() else 1)
