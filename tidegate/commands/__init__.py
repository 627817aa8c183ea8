"""The commands, one file a theme; each imports what it needs when it is called."""
