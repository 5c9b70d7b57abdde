"""Processes that train together: their agreements, and how they divide weights and gather them again."""
