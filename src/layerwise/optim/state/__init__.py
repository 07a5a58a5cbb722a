"""What of an optimizer is saved and loaded, and state that follows replaced parameters."""
