"""Thoughts between `<think>` and `</think>`: tags, pairs, what is wrong with them, how they are scored."""
