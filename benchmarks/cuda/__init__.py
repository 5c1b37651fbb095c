"""Speed of the CUDA backend beside the card's own limits, torch and transformers: python -m benchmarks.cuda."""
