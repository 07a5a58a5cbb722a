"""A run's folder: records, checkpoints, and what it ran on."""
