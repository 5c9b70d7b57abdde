"""The losses of a training, computed without the logits of all positions."""
