"""Dataclasses from JSON: nested ones, what counts as absent, and what is passed on."""

import dataclasses
from typing import Any

import pytest

from miniplm_udf.json_records import from_json
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int


@dataclasses.dataclass(frozen=True)
class Outer:
    by_name: dict[str, Inner]
    several: list[Inner]
    one: Inner | None
    other: Json
    text: str = "default"
    names: list[str] = dataclasses.field(default_factory=list)


WHOLE = Outer(by_name={"a": Inner(1)}, several=[Inner(2)], one=Inner(3), other={"x": {"number": 4}}, names=["n"])


def test_a_record_comes_back_whole() -> None:
    assert from_json(Outer, dataclasses.asdict(WHOLE)) == WHOLE
    assert from_json(Outer, {**dataclasses.asdict(WHOLE), "one": None}) == dataclasses.replace(WHOLE, one=None)
    raw = {"by_name": {}, "several": [], "one": None, "other": {}, "a key of a later release": 1}
    assert from_json(Outer, raw) == Outer({}, [], None, {})


@pytest.mark.parametrize(
    "change",
    [
        {"by_name": {"a": {}}},
        {"by_name": ["a"]},
        {"by_name": None},
        {"several": [None]},
        {"several": {"number": 1}},
        {"one": {}},
        {"one": 3},
    ],
)
def test_a_value_of_another_shape_makes_the_record_absent(change: dict[str, Any]) -> None:
    assert from_json(Outer, {**dataclasses.asdict(WHOLE), **change}) is None


@pytest.mark.parametrize("raw", [None, [], "text", 1, {}, {"by_name": {}}])
def test_what_lacks_a_key_is_absent(raw: Any) -> None:
    assert from_json(Outer, raw) is None


def test_the_first_class_that_fits_is_taken() -> None:
    either: Any = Inner | Outer
    assert from_json(either, {"number": 1}) == Inner(1)
    assert from_json(either, dataclasses.asdict(WHOLE)) == WHOLE
    assert from_json(either, {}) is None
