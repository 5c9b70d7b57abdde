"""The functions that run on executors: slices of rows, the scorers that a process keeps, and its processes and GPUs."""
