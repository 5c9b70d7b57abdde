"""Writes the first config of an experiment from what can be seen: the texts, the teacher, this machine."""
