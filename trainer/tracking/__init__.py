"""Runs in MLflow, TensorBoard and Weights & Biases."""
