"""Names in a config, and defaults that follow another key. Used by the sections; imports nothing of the project."""

import dataclasses

_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
# Stands for a default that follows another key: the dataclass replaces it when it is made.
FOLLOWS = -1


def follows(rule: str) -> int:
    """Returns a field of a dataclass whose default follows another key.

    Args:
        rule: the default in words, for a reader of the fields; `__post_init__` computes it.
    """
    field: int = dataclasses.field(default=FOLLOWS, metadata={"default": rule})
    return field


def name_problem(kind: str, name: str) -> str | None:
    """Returns the message for a name that cannot be part of a column or table name; None for any other name.

    Args:
        kind: what the name stands for.
        name: the name.
    """
    if name and set(name) <= _NAME_CHARACTERS and not name[0].isdigit():
        return None
    return f"{kind} {name!r}: names become column and table names, so use letters, digits and _ (no leading digit)"
