"""Around one optimizer step, in anybody's loop: when it is measured, and what it did to each module."""
