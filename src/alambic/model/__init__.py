"""Models: directories of weights, tokenizer and configuration, and the bases they start from."""
