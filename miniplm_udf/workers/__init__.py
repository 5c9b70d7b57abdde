"""What runs on an executor: slices of rows, scorers that are kept, processes and GPUs that hold them."""
