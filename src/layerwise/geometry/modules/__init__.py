"""What a parameter is, told by the module that owns it."""
