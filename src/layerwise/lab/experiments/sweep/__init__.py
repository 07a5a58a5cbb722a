"""Does a learning rate tuned on a small model carry over to a large one? Sweeps over rates, sizes and methods."""
