"""What a model's parameters do, from one forward pass of it.

look             one look at a model: with the user's batch, one made for it, or none
made_batch       small batches for transformers' models
watched_forward  running the model, and what it returned
follow           the mode that sees every operation
rules            what each operation does to rows and weights
products         the same for matrix products
layers           the same for operations that are whole layers
moves            the same for views, copies and joins
flow             origins of all tensors of one forward pass
origins          what is known of a tensor on its way
addresses        every entry of every parameter has a number
evidence         what is seen of a parameter: uses, places where its rows' results go, outputs
parts            from uses and places to a layout
verdict          a parameter as its modules have it, put right by what was seen
"""

from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.look import Look, look
from layerwise.geometry.forward.verdict import judged
from layerwise.geometry.forward.watched_forward import Forward

__all__ = ["Evidence", "Forward", "Look", "judged", "look"]
