"""How large updates and gradients are, tensor by tensor, whatever they do to the outputs."""
