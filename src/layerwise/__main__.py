"""`python -m layerwise` is the command `layerwise`."""

from layerwise.lab.cli import main

if __name__ == "__main__":
    main()
