"""The keys of a section of the config: which there are, and the message for one that there is not. Nothing heavy.

Input: a key as it is read from YAML, and the dataclass that it is meant for. Output: None, or a message that names the
nearest key. collecting.py checks the values.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(found: str, known: Iterable[str]) -> str:
    """Returns `; did you mean NAME?` for the known name that is most like `found`; empty if none is like it.

    Args:
        found: the unknown name.
        known: the known names.
    """
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def same_for(others: Sequence[str]) -> str:
    """Returns `; the same for KEYS`, the end of a message that holds for several keys; empty without others.

    Args:
        others: the keys besides the one that the message names.
    """
    return f"; the same for {', '.join(others)}" if others else ""


def dataclass_in(annotation: Any) -> tuple[type | None, bool]:
    """Returns the dataclass in a type annotation, or None; and whether it is the type of a dict's values.

    Args:
        annotation: the annotation of a field.
    """
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation), False
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    in_dict = origin is dict
    candidates = arguments[1:] if in_dict else arguments if origin in (types.UnionType, typing.Union) else ()
    sections = [argument for argument in candidates if dataclasses.is_dataclass(argument)]
    return (typing.cast(type, sections[0]), in_dict) if sections else (None, False)


def no_mapping(raw: Any, place: str) -> str:
    """Returns the message for a section that is no mapping.

    Args:
        raw: the value that stands there.
        place: dotted key of the section; "" for the whole config.
    """
    return f"{place or 'config'}: expected a mapping, found {type(raw).__name__}"


def unknown_key(key: Any, owner: type, prefix: str) -> str | None:
    """Returns the message for a key that a section does not have, with the nearest key; None if it has the key.

    Args:
        key: the key.
        owner: the dataclass of the section.
        prefix: dotted keys up to the section.
    """
    known = [field.name for field in dataclasses.fields(owner)]
    if key in known:
        return None
    return f"unknown key {prefix}{key}{nearest(str(key), known)} (known here: {', '.join(known)})"
