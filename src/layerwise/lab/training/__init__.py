"""One run: the loop, and what looks on."""
