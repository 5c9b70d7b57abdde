"""How the streaming queries run: one driver at a time, until the end or for ever, seen and stopped cleanly."""
