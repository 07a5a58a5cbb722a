"""Layerwise inside trainers that people already have. Each module imports its library, and nothing imports the modules."""
