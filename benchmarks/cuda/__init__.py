"""Speed of the CUDA backend's products beside the card's own limits and torch: python -m benchmarks.cuda."""
