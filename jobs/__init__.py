"""Spark entry points, one file a stage, and the `miniplm` command. Thin: read -> transform -> write."""
