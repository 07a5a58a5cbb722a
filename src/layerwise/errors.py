"""The errors users meet: each names the thing, its value and the mend."""


class LayerwiseError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""


class NonFiniteError(LayerwiseError):
    """A gradient held NaN or inf, and the step was not taken. Training has diverged; nothing was wrong with the input."""
