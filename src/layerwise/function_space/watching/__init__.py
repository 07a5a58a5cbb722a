"""What a running optimizer does to each module, and which module does something unusual."""
