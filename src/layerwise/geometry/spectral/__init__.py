"""What the spectral geometry computes: polar factors and nuclear norms."""
