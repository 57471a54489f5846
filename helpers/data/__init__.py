"""From a file or a list to pairs that can be trusted: read, split, rendered, checked."""
