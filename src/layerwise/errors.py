"""The one error type users meet: it names the thing, its value and the mend."""


class LayerwiseError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""
