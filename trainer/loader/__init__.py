"""Token sequences of a packed table, in the order of the training."""
