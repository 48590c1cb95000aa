"""First-order knowledge transfer for PyTorch."""
