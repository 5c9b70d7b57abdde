"""Dataclasses from parsed JSON: the way back from `dataclasses.asdict`.

Owns the rule that every JSON record follows: a record without one of the required keys counts as absent, and a key that
the dataclass does not have is ignored. Numbers and texts are taken as they are, and so are typed dicts. Reads no file.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


class _MissingKeyError(Exception):
    """A JSON object lacks a key, or a value has another shape."""


def from_json(record: type[_T], raw: Any) -> _T | None:
    """Makes a dataclass of a JSON object, with the dataclasses that its fields hold.

    Args:
        record: a dataclass.
        raw: parsed JSON.

    Returns:
        The record; None if `raw`, or an object in it, is no object or lacks a key that has no default.
    """
    try:
        value: _T = _value(record, raw)
    except _MissingKeyError:
        return None
    return value


def _value(kind: Any, raw: Any) -> Any:
    """The value of a field whose type is `kind`."""
    if dataclasses.is_dataclass(kind):
        return _record(kind, raw)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return _first_fit(arguments, raw)
    if origin in (dict, Mapping):
        return {key: _value(arguments[1], value) for key, value in _of_type(dict, raw).items()}
    if origin in (list, Sequence):
        return [_value(arguments[0], value) for value in _of_type(list, raw)]
    if kind is type(None) and raw is not None:
        raise _MissingKeyError
    return raw


def _record(record: Any, raw: Any) -> Any:
    fields = dataclasses.fields(record)
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if not _of_type(dict, raw).keys() >= required:
        raise _MissingKeyError
    kinds = get_type_hints(record)
    return record(**{field.name: _value(kinds[field.name], raw[field.name]) for field in fields if field.name in raw})


def _first_fit(kinds: Sequence[Any], raw: Any) -> Any:
    """The value as the first of several types that it fits; None only fits itself."""
    if raw is None and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            return _value(kind, raw)
        except _MissingKeyError:
            continue
    raise _MissingKeyError


def _of_type(kind: type, raw: Any) -> Any:
    if not isinstance(raw, kind):
        raise _MissingKeyError
    return raw
