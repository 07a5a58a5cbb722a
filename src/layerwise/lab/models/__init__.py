"""Models that a config can name, built without a network."""
