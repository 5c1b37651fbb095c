"""GLM-5 out of operators: configuration to tensors, checkpoint, cache, decoder, generation."""
