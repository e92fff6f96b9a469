"""``mlpint bench``: kernels and blocks timed against plain PyTorch, with their accuracy checked first."""
