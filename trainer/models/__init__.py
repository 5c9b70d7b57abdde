"""Models to train and their teachers: architecture, weights, layers, arithmetic, tokenizer files."""
