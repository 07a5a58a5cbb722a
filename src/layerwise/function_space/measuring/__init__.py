"""How an update's effect on the outputs is measured."""
