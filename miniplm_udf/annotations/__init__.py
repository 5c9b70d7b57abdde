"""Columns about a text besides its scores: duplicates, contamination, language, quality. They decide nothing."""
