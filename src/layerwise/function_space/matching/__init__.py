"""FLeRM: rates that move a large model's outputs as a small model's did."""
