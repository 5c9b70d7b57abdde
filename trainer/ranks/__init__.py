"""Processes that train together: what they agree on, how they share weights, and how these are gathered."""
