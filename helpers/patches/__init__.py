"""Every reach into a private name of a library, one file each."""
