"""The plain form of a text, in which its words are looked for: one form for spellings that look the same."""

import unicodedata

import pyarrow as pa
import pytest

from miniplm_udf.annotations.contamination import _record_of
from miniplm_udf.annotations.words import plain_form, plain_forms

COMPOSED = "Éléments d'été, ça coûte 한국어"


@pytest.mark.parametrize(
    "text",
    [
        unicodedata.normalize("NFD", COMPOSED),
        COMPOSED.replace("ments", "\u00admen\u200bts"),
        "\ufeff" + COMPOSED + "\u200f",
        COMPOSED.replace("ç", "c\u2060\u0327"),
        COMPOSED.replace("é", "é\ufe0f\u034f\U000e0101"),
    ],
    ids=["decomposed", "soft hyphen and zero-width space", "marks", "joiner before an accent", "selectors"],
)
def test_spellings_that_look_the_same_have_one_form(text: str) -> None:
    assert text != COMPOSED
    assert plain_form(text) == COMPOSED


def test_what_looks_different_stays_different() -> None:
    for text in ("plain", "", "ﬁne ２", "ｈello", "🙂 q\u0323", "naïve naive"):
        assert plain_form(text) == text
    assert plain_form("é") != plain_form("e")


def test_every_format_character_is_dropped() -> None:
    by_category = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cf"]
    assert len(by_category) > 100
    assert plain_form("a" + "".join(by_category) + "b") == "ab"


def test_columns_keep_nulls_and_evaluation_files_take_the_same_form() -> None:
    assert plain_forms(pa.array(["e\u0301", None, "a"])).to_pylist() == ["é", None, "a"]
    assert _record_of('{"q": ["e\u0301te\u00ad\u0301"]}'.encode()) == (["été"], None)
