"""Text, tokens and images, cut into batches."""
