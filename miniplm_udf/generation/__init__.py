"""Texts that a model generates: it continues the beginnings of instances, for students that learn by SeqKD."""
