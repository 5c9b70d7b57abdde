"""The proxy: a small regressor that learns the score from a scored sample, and predicts it for the whole pool."""
