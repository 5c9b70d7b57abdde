"""Summaries of stages without the stages: for each dataclass, an object with the simplest value of each field."""

import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from jobs.stage import Stage


def summary_of(stage: Stage, **values: Any) -> Any:
    """A summary as the stage returns it, with these values of its fields."""
    return dataclasses.replace(simplest(stage.summary_class), **values)


def simplest(kind: Any) -> Any:
    """0, "" or False for a number, a text or a truth value; a dict has one key, so that its values are seen."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return None if type(None) in arguments else simplest(arguments[0])
    if origin is dict:
        return {"key": simplest(arguments[1])}
    if origin is list:
        return [simplest(arguments[0])]
    if dataclasses.is_dataclass(kind):
        return kind(**{name: simplest(hint) for name, hint in get_type_hints(kind).items()})  # type: ignore[operator]
    return {} if is_typeddict(kind) else None if kind is Any else kind()
