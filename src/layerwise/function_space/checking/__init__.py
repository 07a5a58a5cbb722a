"""Does one learning rate fit all sizes of a model? The counterpart of muP's coordinate check."""
