"""The optimizers and rates that a config can name."""
