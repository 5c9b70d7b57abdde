"""The versions of a corpus: list, show, compare, pin, inspect and export them, and take documents down.

Reads `refined/<name>`, `corpora`, `pins` and `takedowns` through `store/`. Only the take-down changes rows.
"""
