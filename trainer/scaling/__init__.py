"""Laws of the loss as a function of compute."""
