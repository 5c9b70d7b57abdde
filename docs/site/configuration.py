"""The page of the configuration: every key with its type, default, unit and meaning, from the dataclasses.

Input: `ExperimentConfig` and the sections that it reaches; their docstrings' "Attributes:" are the meanings. Output: a
Markdown page. Imports the config alone.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import griffe

from docs.site.markdown import code, table
from docs.site.units import unit
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.training import TrainConfig

_HEAD = """# Configuration

An experiment is one YAML file. Every key can also be set on the command line, `score.workers=8`; for a mistyped key
the error suggests the most similar one. `--dry-run` of a command prints the resolved config. This page is generated
from the dataclasses in `miniplm_udf/config`, so it has every key of this version. NAME stands for your own name.
A key without a default must be set. `null` in a file takes the default that the meaning describes.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        name: the key, without the section.
        type: its type, as a reader writes it in YAML.
        default: its default; "required" if there is none.
        unit: its unit; empty if there is none.
        meaning: what the class's docstring says about it; empty if it says nothing.
    """

    name: str
    type: str
    default: str
    unit: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of the config.

    Attributes:
        path: dotted path, such as `ingest.chunking`; empty for the top level.
        summary: the docstring of its class, without the attributes.
        keys: the keys in the order of the class, without those that are sections.
        is_optional: whether a config without the section leaves its stage out, instead of taking the defaults.
        same_as: path of the section that has the same keys and is described instead; empty for any other section.
    """

    path: str
    summary: str
    keys: list[Key]
    is_optional: bool
    same_as: str


def docstring_parts(owner: type) -> tuple[str, dict[str, str]]:
    """Returns the text of a class's docstring, and the meanings of its attributes by name.

    Args:
        owner: a dataclass.
    """
    texts, meanings = [], {}
    for part in griffe.Docstring(inspect.getdoc(owner) or "").parse("google", warnings=False):
        if part.kind is griffe.DocstringSectionKind.attributes:
            meanings = {each.name: " ".join(each.description.split()) for each in part.value}
        elif part.kind is griffe.DocstringSectionKind.text:
            texts.append(part.value)
    return "\n\n".join(texts), meanings


def type_name(annotation: Any) -> str:
    """Returns a type annotation in the words of YAML.

    Args:
        annotation: the annotation of a field.
    """
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(each) for each in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    return "mapping"


def section_in(annotation: Any) -> tuple[type | None, bool]:
    """Returns the dataclass in a type annotation, or None, and whether it describes the values of a mapping by name.

    Args:
        annotation: the annotation of a field.
    """
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation), False
    arguments = [each for each in typing.get_args(annotation) if dataclasses.is_dataclass(each)]
    inner = typing.cast(type, arguments[0]) if arguments else None
    return inner, inner is not None and typing.get_origin(annotation) is dict


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    plain = {None: "null", True: "true", False: "false", "": '""'}
    return plain[value] if isinstance(value, str | bool | None) and value in plain else str(value)


def sections(owner: type = ExperimentConfig, path: str = "", is_optional: bool = False) -> Iterator[Section]:
    """Goes through the sections of the config, each before the sections inside it.

    Args:
        owner: the dataclass to begin with.
        path: its dotted path.
        is_optional: whether a config may be without the section.
    """
    summary, meanings = docstring_parts(owner)
    hints = typing.get_type_hints(owner)
    fields = dataclasses.fields(owner)
    inner = {field.name: section_in(hints[field.name]) for field in fields}
    keys = [
        Key(
            field.name,
            type_name(hints[field.name]),
            _default(field),
            unit(field.name) if hints[field.name] not in (str, bool) else "",
            meanings.get(field.name, ""),
        )
        for field in fields
        if inner[field.name][0] is None
    ]
    same_as = "train" if owner is TrainConfig and path != "train" else ""
    yield Section(path, summary, keys, is_optional, same_as)
    for name, (section, has_names) in inner.items():
        if section is not None:
            dotted = ".".join(filter(None, [path, name]))
            may_be_null = type(None) in typing.get_args(hints[name])
            yield from sections(section, f"{dotted}.NAME" if has_names else dotted, may_be_null)


def page() -> str:
    """Returns the page of the configuration."""
    parts = [_HEAD]
    for section in sections():
        title = f"## `{section.path}`" if section.path else "## The top level"
        if section.same_as:
            parts.append(f"{title}\n\nThe keys of [`{section.same_as}`](#{section.same_as}).\n")
            continue
        rows = [
            (
                code(key.name),
                key.type,
                code(key.default) if key.default != "required" else "required",
                key.unit,
                key.meaning,
            )
            for key in section.keys
        ]
        absence = " Without this section, its part is left out." if section.is_optional else ""
        parts.append(f"{title}\n\n{section.summary}{absence}\n")
        if rows:
            parts.append(table(("key", "type", "default", "unit", "meaning"), rows))
    # Docstrings name pages by their path in the repository.
    return re.sub(r"docs/([\w-]+)\.md", r"[the page](../\1.md)", "\n".join(parts))
