"""What a model's parameters do, from one forward pass of it.

made_batch       small batches for transformers' models
watched_forward  one look at a model, with the user's batch, one made for it, or none; the mode that sees every operation
rules            what each operation does to rows and weights
layers           the same for operations that are whole layers, and matrix products
moves            the same for views, copies and joins
flow             what is known of a tensor on its way, and of all tensors of one forward pass
addresses        every entry of every parameter has a number
evidence         what is seen of a parameter: uses, places where its rows' results go, outputs
parts            from uses and places to a layout
verdict          a parameter as its modules have it, put right by what was seen
"""

from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.verdict import judged
from layerwise.geometry.forward.watched_forward import Forward, look

__all__ = ["Evidence", "Forward", "judged", "look"]
