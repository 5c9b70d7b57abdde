"""Dotted overrides of a config, `a.b.c=value`: which key they set, and how the text of the value is read.

Input: the mapping read from the YAML file, an override, the dataclass of the whole config. Output: the mapping, changed
in place. The declared type of the key decides how a value is read: for a key that takes text, the value is kept as it
was typed, so that a path with `#`, a date, or a name such as `no` or `1e3` stay unchanged; any other value is read as
YAML. `experiment.load_config` checks afterwards whether the value has the declared type.
"""

import dataclasses
import types
import typing
from typing import Any, Literal

from miniplm_udf.config.sections import check
from miniplm_udf.storage import Json


def apply_override(raw: Json, override: str, owner: type) -> None:
    """Sets one `a.b.c=value`.

    Args:
        raw: the mapping of the YAML file; changed in place.
        override: an override as the user typed it, with or without `--` in front.
        owner: dataclass of the whole config.

    Raises:
        ConfigError: the override is not `key=value`.
    """
    key, equals, text = override.partition("=")
    check(bool(equals and key), f"override {override!r}: expected key=value, for example root=/data/run1")
    names = key.removeprefix("--").split(".")
    target, hint = raw, owner
    while len(names) > 1:
        inner, takes_dots = _member(hint, names[0])
        if takes_dots:
            break
        hint, name = inner, names.pop(0)
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    target[".".join(names)] = _value(_member(hint, names[0])[0], text)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _member(hint: Any, name: str) -> tuple[Any, bool]:
    """The declared type of the key `name` in a value of type `hint`, and whether the rest of the dotted key is one key.

    The keys of a mapping to plain values, such as `spark.conf`, may have dots. The type of an unknown key is Any.
    """
    for kind in _alternatives(hint):
        if dataclasses.is_dataclass(kind):
            return typing.get_type_hints(kind).get(name, Any), False
        if typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
            return inner, not (inner is Any or dataclasses.is_dataclass(inner))
    return Any, False


def _is_text(hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in typing.get_args(hint))
    return hint is str


def _value(hint: Any, text: str) -> Any:
    """The value that a text stands for, by the declared type; the text itself if it is not YAML."""
    import yaml

    kinds = _alternatives(hint)
    others = [kind for kind in kinds if kind is not types.NoneType and not _is_text(kind)]
    if not others:
        return None if types.NoneType in kinds and text in ("null", "") else text
    # For example `ingest.input`: one path, or a list of paths.
    is_text_or_list = others == [list[str]] and str in kinds
    if is_text_or_list and not text.startswith("["):
        return text
    # BaseLoader keeps every plain value as text.
    loader = yaml.BaseLoader if set(others) <= {list[str], dict[str, str]} and text != "null" else yaml.SafeLoader
    try:
        value = yaml.load(text, Loader=loader)
    except yaml.YAMLError:
        return text
    return text if is_text_or_list and not isinstance(value, list) else value
