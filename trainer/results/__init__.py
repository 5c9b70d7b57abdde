"""The output of a finished training: the model folder, and its registration in MLflow."""
