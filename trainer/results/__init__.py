"""What a finished training leaves: the model folder, and its registration in MLflow."""
