"""Makes the sections of a config from plain data, and collects everything that is wrong in them.

Input: plain data as it is read from YAML, and the dataclass that it is meant for. Output: a `Checked`: the values that
are right, and a sentence with the full key for each that is not. jsonargparse reads a single value as its declared
type; each section checks its own values when it is made. A wrong key is left out, so that the checks after it still see
the other keys. Links between sections are not checked (links.py). Imports nothing heavy at module level.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from miniplm_udf.config.keys import dataclass_in, no_mapping, unknown_key
from miniplm_udf.config.student_models import fill_in
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json

# A message that begins with a key, or with several: `select.low, select.high: ...`.
_KEYS = re.compile(r"[a-z_0-9.]+(, [a-z_0-9.]+)*:")


@dataclasses.dataclass
class Checked:
    """The result of a check.

    Attributes:
        values: the values that are right, by key.
        problems: a sentence for each that is not.
    """

    values: Json = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def check_sections(raw: Json, owner: type) -> Checked:
    """Checks each section of a config by itself.

    Args:
        raw: the config; not changed.
        owner: dataclass of the whole config.

    Returns:
        The sections that are right, as objects; and what is wrong.
    """
    checked = Checked()
    raw = _known(raw, owner, "", checked)
    if isinstance(raw.get("train"), dict):
        # The students inherit this section: a mistake in it is one problem, not one of each student.
        _, raw["train"] = _made(raw["train"], TrainConfig, "train", checked)
    for place, section in _models_to_train(raw):
        try:
            fill_in(section)
        except ConfigError as error:
            checked.problems.append(str(error))
            wrong = place.pop("model", None)
            place.setdefault("architecture", {})
            fill_in(section)
            # The name says to later checks that the architecture is unknown.
            place["model"] = str(wrong)
    checked.values = _fields(raw, owner, "", checked)[0]
    return checked


def _models_to_train(raw: Json) -> Iterator[tuple[Json, Json]]:
    """Each model to train, and a config that has it alone, which shares the model with `raw`."""
    shared = {"train": raw.get("train")}
    students = raw.get("students")
    for name, student in (students if isinstance(students, dict) else {}).items():
        if isinstance(student, dict):
            yield student, {**shared, "students": {name: student}}
    if isinstance(raw.get("reference"), dict):
        yield raw["reference"], {**shared, "reference": raw["reference"]}


def _known(raw: Any, owner: type, prefix: str, checked: Checked) -> Any:
    """A copy of a section without the keys that it does not have."""
    if not isinstance(raw, dict):
        return raw
    hints, known = typing.get_type_hints(owner), {}
    for key, value in raw.items():
        if message := unknown_key(key, owner, prefix):
            checked.problems.append(message)
            continue
        inner, in_dict = dataclass_in(hints[key])
        if inner and in_dict and isinstance(value, dict):
            value = {name: _known(item, inner, f"{prefix}{key}.{name}.", checked) for name, item in value.items()}
        elif inner:
            value = _known(value, inner, f"{prefix}{key}.", checked)
        known[key] = value
    return known


def _fields(raw: Json, owner: type, place: str, checked: Checked) -> tuple[Json, Json]:
    """The fields of a section that are right by themselves: as values, and as plain data."""
    hints = typing.get_type_hints(owner)
    values, plain = {}, {}
    for key, value in raw.items():
        inner_place = f"{place}.{key}" if place else key
        inner, in_dict = dataclass_in(hints[key])
        if inner is None or value is None or (in_dict and not isinstance(value, dict)):
            if (message := _type_problem(value, hints[key], inner_place)) is None:
                values[key], plain[key] = _read(value, hints[key]), value
            else:
                checked.problems.append(message)
        elif in_dict:
            made = {name: _made(item, inner, f"{inner_place}.{name}", checked) for name, item in value.items()}
            values[key] = {name: item for name, (item, _) in made.items() if item is not None}
            plain[key] = {name: item for name, (_, item) in made.items()}
        else:
            section, plain[key] = _made(value, inner, inner_place, checked)
            if section is not None:
                values[key] = section
    return values, plain


def _made(raw: Any, owner: type, place: str, checked: Checked) -> tuple[Any, Any]:
    """A section as an object and as plain data, without the keys that are wrong; None if no object can be made."""
    if not isinstance(raw, dict):
        checked.problems.append(no_mapping(raw, place))
        return None, {}
    values, plain = _fields(raw, owner, place, checked)
    missing = [field.name for field in dataclasses.fields(owner) if _is_required(field) and field.name not in values]
    if missing:
        checked.problems += [
            f"{place}.{name}: expected a value, found none; set it" for name in missing if name not in raw
        ]
        return None, plain
    left_out: list[str] = []
    while (message := _refused(owner, values)) is not None:
        # Without a wrong key, a section may ask for this key.
        if not any(re.search(rf"\b{key}\b", message) for key in left_out):
            checked.problems.append(_with_full_key(message, place))
        wrong = _wrong_key(owner, values, message)
        if wrong is None:
            return None, plain
        left_out.append(wrong)
        values.pop(wrong)
        plain.pop(wrong)
    return owner(**values), plain


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _refused(owner: type, values: Json) -> str | None:
    """The message with which a section refuses its values; None if it takes them."""
    try:
        owner(**values)
    except ConfigError as error:
        return str(error)
    return None


def _wrong_key(owner: type, values: Json, message: str) -> str | None:
    """The key that makes a section say this message; the key that the message names first comes first."""
    required = {field.name for field in dataclasses.fields(owner) if _is_required(field)}
    places = {name: re.search(rf"\b{name}\b", message) for name in sorted(values.keys() - required)}
    names = sorted(places, key=lambda name: place.start() if (place := places[name]) else len(message))
    without = ((name, _refused(owner, {key: values[key] for key in values if key != name})) for name in names)
    # A key that is left out has its default, with which the section may say the same of another value.
    return next((name for name, refused in without if _expected(refused or "") != _expected(message)), None)


def _expected(message: str) -> str:
    """The beginning of a message, without the values that were found."""
    return message.partition(", found ")[0]


def _with_full_key(message: str, place: str) -> str:
    """The message with the section's own place in front of its keys, unless it has it."""
    if re.match(rf"{place.partition('.')[0]}[.:]", message):
        return message
    keys = _KEYS.match(message)
    if keys is None:
        return f"{place}: {message}"
    parts = message[: keys.end() - 1].split(", ")
    last = place.rpartition(".")[2]
    # A section may begin its keys with its own name: `split: ...` stands in ingest.split.
    own = ["" if part == last else part.removeprefix(f"{last}.") for part in parts]
    full = [".".join(filter(None, (place, part))) for part in own]
    return f"{', '.join(full)}{message[keys.end() - 1 :]}"


def _type_problem(value: Any, hint: Any, place: str) -> str | None:
    try:
        _read(value, hint)
    except ConfigError:
        return f"{place}: expected {_in_words(hint)}, found {value!r}; correct the value"
    return None


def _read(value: Any, hint: Any) -> Any:
    """The value as its declared type.

    Raises:
        ConfigError: it has another type.
    """
    try:
        return _parser(hint).parse_object({"value": value}).value
    except Exception as error:  # jsonargparse's errors have no common base but Exception
        raise ConfigError(str(error)) from error


@functools.cache
def _parser(hint: Any) -> Any:
    """A parser of one value; making it takes longer than parsing."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _in_words(hint: Any) -> str:
    """Describes a type annotation as a user writes its values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, arguments))
    if origin is list:
        return f"a list of {_in_words(arguments[0])}"
    if origin is dict:
        return "a mapping"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
