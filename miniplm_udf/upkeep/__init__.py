"""Upkeep of a root: maintenance of its tables, checks before a command, and verification of what the tables hold."""
