"""When it is measured: around one optimizer step, in anybody's loop."""
