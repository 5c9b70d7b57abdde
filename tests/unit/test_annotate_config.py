"""The section `annotate`: off unless given, groups by their keys, mistakes named; and the columns of its table."""

import dataclasses
from pathlib import Path

import pytest

from jobs.stages import STAGES, stage_named
from miniplm_udf import schemas
from miniplm_udf.annotations.contamination import _record_of, strings_of
from miniplm_udf.annotations.language import languages
from miniplm_udf.config.annotate import AnnotateConfig, ContaminationConfig, NearDuplicatesConfig
from miniplm_udf.config.experiment import load_config
from miniplm_udf.errors import ConfigError

DEMO = Path(__file__).resolve().parents[2] / "conf" / "demo.yaml"


def test_it_is_off_unless_given() -> None:
    plain = dataclasses.replace(load_config(DEMO), annotate=None)
    assert not stage_named("annotate").applies(plain)
    config = load_config(DEMO, ["annotate={duplicates: true, near_duplicates: {threshold: 0.7}, quality: false}"])
    assert config.annotate == AnnotateConfig(duplicates=True, near_duplicates=NearDuplicatesConfig(threshold=0.7))
    assert config.annotate.groups == ["duplicates", "near_duplicates"]
    assert stage_named("annotate").applies(config)
    # Before the stages that take hours.
    names = [stage.name for stage in STAGES]
    assert names.index("ingest") < names.index("annotate") < names.index("score")


def test_every_group_has_columns_and_a_key() -> None:
    everything = AnnotateConfig(
        duplicates=True, near_duplicates=NearDuplicatesConfig(), language=True, quality=True,
        contamination=ContaminationConfig(files="/eval"),
    )  # fmt: skip
    assert everything.groups == list(schemas.ANNOTATIONS_BY_GROUP)
    names = schemas.annotations(everything.groups).column_names
    assert len(names) == len(set(names))
    # One expression may name annotations and these columns together.
    others = {*schemas.INSTANCES.column_names, *schemas.score_matrix(["teacher"]).column_names}
    assert set(names) & others == {"instance_id", "ingested_at"}
    assert "language" not in schemas.annotations(["quality"]).column_names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("annotate={}", "at least one of duplicates, near_duplicates, contamination, language, quality"),
        ("annotate.langage=true", r"annotate\.langage; did you mean 'language'"),
        ("annotate.near_duplicates={threshold: 1.2}", "above 0 and at most 1, found 1.2"),
        ("annotate.near_duplicates={shingle_words: 0}", "at least 1, found 0"),
        ("annotate.contamination={files: []}", "paths of evaluation files"),
        ("annotate.contamination={files: /eval, ngram_words: 0}", "at least 1, found 0"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, [override])


def test_every_string_of_an_evaluation_record_counts() -> None:
    record = {"question": "one", "choices": ["two", {"text": "three"}], "answer": 1, "ok": None, "id": "four"}
    assert list(strings_of(record)) == ["one", "two", "three", "four"]
    assert _record_of(b'\xef\xbb\xbf{"a": "b"}') == (["b"], None)
    assert _record_of(b"  \r") is None
    for line, problem in ((b"[1]", "found list"), (b"{", "JSONDecodeError"), (b'{"a": "\xff"}', "UnicodeDecodeError")):
        found = _record_of(line)
        assert found is not None
        assert found[0] == []
        assert problem in str(found[1])
    # Half a character is in no text.
    assert _record_of(b'{"a": "x\\ud800"}') == (["x?"], None)


def test_the_language_of_a_text() -> None:
    import pyarrow as pa

    texts = {
        "en": "The committee has decided to publish the report on the water of the lake next year.",
        "de": "Der Ausschuss hat beschlossen, den Bericht über das Wasser des Sees nächstes Jahr zu veröffentlichen.",
        "fr": "Le comité a décidé de publier l'année prochaine le rapport sur l'eau du lac et de la rivière.",
        "zh": "委员会决定明年发表关于湖水的报告，以便公众能够了解情况。",
    }
    rows = languages(pa.array([*texts.values(), " "], pa.string())).to_pylist()
    assert [row["language"] for row in rows[:4]] == list(texts)
    assert all(0 <= row["language_confidence"] <= 1 for row in rows)
    # A text of no language has little to say for any.
    assert rows[4]["language_confidence"] < min(row["language_confidence"] for row in rows[:4])
