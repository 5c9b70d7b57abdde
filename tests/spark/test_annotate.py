"""Annotations: every column against a plain computation, at once or bit by bit; refined by, taken down, checked."""

import dataclasses
import datetime
import gzip
import importlib.metadata
import json
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs import annotate as job
from jobs import refine
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf import schemas, storage
from miniplm_udf.annotations import contamination, duplicates, packages
from miniplm_udf.annotations import quality as quality_columns
from miniplm_udf.annotations.annotate import AnnotationSummary
from miniplm_udf.annotations.contamination import EvaluationNgrams
from miniplm_udf.config.annotate import AnnotateConfig, ContaminationConfig, NearDuplicatesConfig
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.corpora import takedown
from miniplm_udf.corpora.inspection import Question, inspect
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.store.takedowns import Takedown
from miniplm_udf.upkeep import maintain, verify
from tests.support.annotation_oracles import jaccard, ngrams, plant, quality, random_text
from tests.support.matrices import ALIASES, ids, matrix_rows, with_corpora, write_matrix, write_record
from tests.support.score_tables import experiment

THRESHOLD, NGRAM = 0.8, 13
ENGLISH = "The committee has decided to publish the report on the water of the lake next year, and that is all."
SPEECHES = {
    "en": ENGLISH,
    "de": "Der Ausschuss hat beschlossen, den Bericht über das Wasser des Sees nächstes Jahr zu veröffentlichen.",
    "zh": "委员会决定明年发表关于湖水的报告，以便公众能够了解情况。委员会还决定今年不再开会，请大家放心。",
}
SHAPES = {
    "blank": " \n\t ",
    "signs": "!!! ... --- {x} # # …\n- one\n* two\n• three\n\n\nends here...\nends here...\nand one more, is it not?",
    "lines": "A line that is long enough not to be short.\n" * 3
    + "Another one of some length, with no stop at its end",
    "lorem": "Lorem ipsum dolor sit amet, lorem ipsum dolor sit amet, lorem ipsum dolor sit amet again.",
    "short": "three words only",
    "one": "word",
    "code": "for i in range(10):\n    print(i)\n    print(i)\n}\n",
}
COPIED = "Some text that is delivered again and again, under other ids, by one who has nothing else to deliver."
BENCHMARK = " ".join(f"question{number}" for number in range(40))
BATCHES = 2
# One text in three spellings that look the same: composed, decomposed, with characters that cannot be seen.
ACCENTED = " ".join(f"Élève{number} coûté" for number in range(10))
DECOMPOSED = unicodedata.normalize("NFD", ACCENTED)
UNSEEN = "\ufeff" + ACCENTED.replace("lè", "l\u00ad\u200bè").replace("û", "u\u2060\u0302").replace(" ", " \u200e")


def make_texts() -> dict[str, tuple[int, str]]:
    """Micro-batch and text, by id. Ids are of no order that tells anything."""
    rng = random.Random(5)
    made: dict[str, tuple[int, str]] = {name: (0, text) for name, text in {**SPEECHES, **SHAPES}.items()}
    # Copies in both micro-batches, the first of which has the greater id.
    made |= {name: (batch, COPIED) for name, batch in (("z copied", 0), ("y copied", 1), ("x", 1))}
    made |= {"a short copy": (1, "Three words, ONLY!"), "blank again": (1, "  \n")}
    for number, target in enumerate((0.3, 0.6, 0.85, 0.9, 0.95, 0.97)):
        pair = plant(rng, target, 300)
        places = (1, 0) if number % 2 else (number // 2 % BATCHES, 1)
        made |= {f"p{number} made": (places[0], pair.original), f"q{number} of it": (places[1], pair.copy)}
    asked = BENCHMARK.split()
    made["asked"] = (0, random_text(rng, 30) + " " + " ".join(asked[:20]).upper() + ", " + random_text(rng, 5))
    made["asked twice"] = (1, " ".join(asked[5:20]) + " and " + ", ".join(asked[5:20]))
    made["almost asked"] = (1, " ".join(asked[:12]) + " else " + " ".join(asked[13:25]))
    made |= {"composed": (0, ACCENTED), "decomposed": (1, DECOMPOSED), "unseen": (1, UNSEEN)}
    return made


TEXTS = make_texts()
EVALUATED = [BENCHMARK, SPEECHES["zh"], "too short to be found", DECOMPOSED]


def write(spark: Any, config: ExperimentConfig, texts: Mapping[str, tuple[int, str]]) -> None:
    """Appends instances of the pool (a later micro-batch is an hour later), and one held-out instance."""
    rows = []
    held_out = {"held out": (0, ENGLISH)} if "en" in texts else {}
    for name, (batch, text) in {**texts, **held_out}.items():
        values = {
            "instance_id": name, "stream_id": name, "ordinal": 0, "document_ids": [f"document of {name}"],
            "start_byte": 0, "source": "web", "text": text, "segment_ends": [], "starts_document": True,
            "ends_document": True, "n_bytes": len(text.encode()), "content_hash": f"hash of {text}",
            "split": "heldout" if name == "held out" else "pool", "metadata": None,
            "ingested_at": datetime.datetime(2026, 1, 1, batch, tzinfo=datetime.UTC), "query_id": "0" * 32,
            "batch_id": batch,
        }  # fmt: skip
        rows.append(tuple(values[column] for column in schemas.INSTANCES.column_names))
    frame = spark.createDataFrame(rows, schemas.INSTANCES.spark_schema())
    tables.append(frame, config.layout.table("instances"), schemas.INSTANCES)


def config_of(folder: Path) -> ExperimentConfig:
    """All groups; evaluation files of three kinds."""
    evaluation = folder / "evaluation"
    (evaluation / "more").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": 1, "parts": [{"question": EVALUATED[0]}, 7, EVALUATED[3]]}),
        "",
        json.dumps({"q": EVALUATED[2]}),
    ]
    (evaluation / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    (evaluation / "more" / "b.Txt.gz").write_bytes(gzip.compress(EVALUATED[1].encode()))
    (evaluation / "c.csv").write_text("not,looked,at")
    settings = AnnotateConfig(
        duplicates=True, near_duplicates=NearDuplicatesConfig(threshold=THRESHOLD), language=True, quality=True,
        contamination=ContaminationConfig(files=str(evaluation), ngram_words=NGRAM),
    )  # fmt: skip
    made = experiment(folder / "root", {alias: ModelConfig(path="/nowhere") for alias in ALIASES})
    return dataclasses.replace(made, annotate=settings)


def rows_of(spark: Any, config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    found = tables.read(spark, config.layout.table("annotations")).collect()
    rows = {row["instance_id"]: row.asDict() for row in found}
    assert len(rows) == len(found)
    return rows


def wrong(spark: Any, config: ExperimentConfig) -> list[verify.Check]:
    return [check for check in verify.verify(spark, config.root) if not check.ok or check.behind]


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, AnnotationSummary]:
    """A root whose instances were annotated all at once, and the summary of that."""
    config = config_of(tmp_path_factory.mktemp("annotated"))
    write(spark, config, TEXTS)
    return config, job.run(spark, config)


@pytest.fixture
def copy(made: tuple[ExperimentConfig, Any], tmp_path: Path) -> ExperimentConfig:
    """The same root again, to be changed; its evaluation files are where they were."""
    config, _ = made
    shutil.copytree(storage.local_path(config.root), tmp_path / "root")
    return dataclasses.replace(config, root=str(tmp_path / "root"))


def before(name: str) -> list[str]:
    """The texts that were ingested before one, the first first."""
    order = sorted(TEXTS, key=lambda one: (TEXTS[one][0], one))
    return order[: order.index(name)]


def test_every_column_is_what_a_plain_computation_says(spark: Any, made: tuple[ExperimentConfig, Any]) -> None:
    config, summary = made
    rows = rows_of(spark, config)
    assert rows.keys() == TEXTS.keys()
    evaluation = {gram for text in EVALUATED for gram in ngrams(text, NGRAM)}
    for name, row in rows.items():
        text = TEXTS[name][1]
        copies = [other for other in before(name) if TEXTS[other][1] == text]
        assert row["duplicate_of"] == (copies[0] if copies else None), name
        shared = [gram in evaluation for gram in ngrams(text, NGRAM)]
        assert row["contaminated_ngrams"] == sum(shared), name
        assert row["contaminated_share"] == (sum(shared) / len(shared) if shared else None), name
        for column, expected in quality(text).items():
            found = row[column]
            assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), (name, column)
        if name in SPEECHES:
            assert row["language"] == name
            assert 0 < row["language_confidence"] <= 1
    assert {name for name, row in rows.items() if row["contaminated_ngrams"]} == {
        "asked", "asked twice", "zh", "composed", "decomposed", "unseen",
    }  # fmt: skip
    assert {rows[name]["contaminated_share"] for name in ("composed", "decomposed", "unseen")} == {1.0}
    assert rows["asked"]["contaminated_ngrams"] == 8
    assert {name for name, row in rows.items() if row["duplicate_of"]} == {"x", "y copied"}
    counted = ("annotated", "new_annotated", "duplicates", "contamination", "evaluation")
    assert [dataclasses.asdict(summary)[name] for name in counted] == [
        len(TEXTS), len(TEXTS), 2, 6, {"ngrams": len(evaluation), "records": 3, "short_records": 1},
    ]  # fmt: skip
    assert summary.near_duplicates == sum(row["near_duplicate_of"] is not None for row in rows.values())
    languages = Counter(row["language"] for row in rows.values())
    assert {name: languages[name] for name in summary.languages} == summary.languages
    assert list(summary.languages.values()) == sorted(languages.values(), reverse=True)[:10]
    assert wrong(spark, config) == []


def test_near_duplicates_are_near_and_came_before(spark: Any, made: tuple[ExperimentConfig, Any]) -> None:
    rows = rows_of(spark, made[0])
    named = {name: row["near_duplicate_of"] for name, row in rows.items() if row["near_duplicate_of"]}
    for name, other in named.items():
        assert other in before(name)
        found = rows[name]["near_duplicate_jaccard"]
        assert found == jaccard(TEXTS[name][1], TEXTS[other][1]) >= THRESHOLD
    near = {}
    for name, (_, text) in TEXTS.items():
        others = [one for one in before(name) if text.strip() and TEXTS[one][1].strip()]
        near[name] = [one for one in others if jaccard(text, TEXTS[one][1]) >= THRESHOLD]
    # Copies, and texts that differ in signs alone, share every bucket.
    assert named["a short copy"] == "short"
    assert named["y copied"] == named["x"] == "z copied"
    assert named["decomposed"] == named["unseen"] == "composed"
    assert named.keys() == {name for name, others in near.items() if others}
    assert {f"q{number} of it" for number in (2, 4)} | {f"p{number} made" for number in (3, 5)} <= named.keys()
    assert all(rows[name]["minhash_buckets"] == [] for name in ("blank", "blank again"))


def test_what_is_new_is_added_and_as_good_as_at_once(
    spark: Any, made: tuple[ExperimentConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(made[0], root=str(tmp_path / "root"))
    uri = config.layout.table("annotations")
    write(spark, config, {name: found for name, found in TEXTS.items() if found[0] == 0})
    # A driver that dies before the commit leaves nothing; one that dies after it, all.
    commit = corpus_records.commit
    for dies_after in (False, True):

        def dying(*arguments: Any, dies_after: bool = dies_after, **named: Any) -> int:
            if dies_after:
                commit(*arguments, **named)
            raise KeyboardInterrupt

        monkeypatch.setattr(corpus_records, "commit", dying)
        with pytest.raises(KeyboardInterrupt):
            job.run(spark, config)
        assert tables.exists(spark, uri) == dies_after
    monkeypatch.undo()
    first = rows_of(spark, config)
    version = delta_log.newest_version(uri)
    assert job.run(spark, config).new_annotated == 0
    assert delta_log.newest_version(uri) == version
    write(spark, config, {name: found for name, found in TEXTS.items() if found[0] == 1})
    found = job.run(spark, config)
    assert found.new_annotated == len(TEXTS) - len(first)
    assert found.annotated == len(TEXTS)
    assert delta_log.newest_version(uri) == version + 1
    assert rows_of(spark, config) == rows_of(spark, made[0])


@pytest.mark.long
def test_other_settings_make_it_again_and_other_names_of_files_do_not(
    spark: Any, copy: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert copy.annotate is not None
    assert copy.annotate.contamination is not None
    place = Path(copy.root.removeprefix("file://")).parent / "moved"
    shutil.copytree(copy.annotate.contamination.paths[0], place)
    moved = ContaminationConfig(files=[f"{place}/*", f"{place}/more"], ngram_words=NGRAM)
    again = dataclasses.replace(copy, annotate=dataclasses.replace(copy.annotate, contamination=moved))
    with caplog.at_level("WARNING", logger="miniplm"):
        execute(stage_named("annotate"), spark, again)
    assert f"annotate.contamination.files: 1 names are left out: {place}/c.csv" in caplog.text
    assert job.run(spark, again).new_annotated == 0
    assert stage_named("annotate").is_unchanged(spark, again)
    (place / "a.JSONL").write_text(json.dumps({"q": ENGLISH}))
    assert not stage_named("annotate").is_unchanged(spark, again)
    few = dataclasses.replace(again.annotate, near_duplicates=None, language=False, quality=False)
    changed = dataclasses.replace(again, annotate=few)
    assert job.run(spark, changed).new_annotated == len(TEXTS)
    rows = rows_of(spark, changed)
    assert rows["asked"].keys() == {
        "instance_id", "ingested_at", "duplicate_of", "contaminated_ngrams", "contaminated_share", "annotated_by",
    }  # fmt: skip
    assert rows["en"]["contaminated_share"] == 1
    assert wrong(spark, changed) == []


def scored(spark: Any, config: ExperimentConfig, names: list[str]) -> None:
    """A matrix with a row for each of these instances, none of them short."""
    rows = [
        row | {"instance_id": name, "split": "pool", "teacher_n_tokens": 100}
        for row, name in zip(matrix_rows(len(names)), names, strict=True)
    ]
    write_matrix(spark, config, rows)
    for alias in ALIASES:
        write_record(config, alias)


@pytest.mark.long
def test_refinement_by_annotations(spark: Any, copy: ExperimentConfig) -> None:
    names = sorted(TEXTS)
    scored(spark, copy, names)
    everything = SelectConfig(ratio=1.0)
    config = with_corpora(
        copy,
        clean=CorpusConfig(
            where="duplicate_of is null and contaminated_ngrams = 0 and near_duplicate_of is null", select=everything
        ),
        long=CorpusConfig(score="n_words + length(text) / 1e6", where="true", select=SelectConfig(ratio=0.5)),
    )
    refined = refine.run(spark, config).refined
    rows = rows_of(spark, config)
    naming = ("duplicate_of", "near_duplicate_of", "contaminated_ngrams")
    clean = [name for name, row in rows.items() if not any(row[column] for column in naming)]
    assert ids(corpus_records.read_corpus(spark, config.root, "clean")) == sorted(clean)
    assert 0 < len(clean) < len(names)
    ranked = sorted(names, key=lambda name: (-len(TEXTS[name][1].split()) - len(TEXTS[name][1]) / 1e6, name))
    assert ids(corpus_records.read_corpus(spark, config.root, "long")) == sorted(ranked[: len(names) // 2])
    newest = corpus_records.newest(config.layout.table("annotations"))
    assert newest is not None
    inputs = {name: corpus_records.show_corpus(spark, config.root, name)["inputs"] for name in ("clean", "long")}
    assert [inputs[name]["annotations_version"] for name in ("clean", "long")] == [newest.version] * 2
    versions = {name: importlib.metadata.version(name) for name in ("datasketch", "py3langid")}
    assert inputs["clean"]["annotated_by"]["packages"] == versions
    assert inputs["clean"]["annotated_by"]["near_duplicates"] == {"threshold": THRESHOLD, "shingle_words": 5}
    assert "instances_version" in inputs["long"]
    assert "instances_version" not in inputs["clean"]
    named = {check.name: check for check in verify.verify(spark, config.root)}
    assert named["corpus long, version 1: rows are the matrix's"] == verify.Check(
        "corpus long, version 1: rows are the matrix's", len(names) // 2, len(names) // 2, True
    )
    # Dropped rows can be asked for by these columns too, alone and together with the text.
    named_copies = {name for name in names if rows[name]["duplicate_of"]}
    for sql in ("duplicate_of is not null", "duplicate_of is not null and length(text) > 0"):
        shown = inspect(spark, config.root, "clean", Question(sql="duplicate_of is null", n_rows=100))
        assert {row["instance_id"] for row in shown.rows} == set(clean)
        with pytest.raises(CorpusError, match="expected kept rows where duplicate_of is not null"):
            inspect(spark, config.root, "clean", Question(sql=sql))
        shown = inspect(spark, config.root, "long", Question(side="dropped", sql=sql, n_rows=100))
        assert {row["instance_id"] for row in shown.rows} == named_copies - set(ranked[: len(names) // 2])
    # Merged files are the same annotations; others are others.
    tables.merge_small_files(spark, config.layout.table("annotations"))
    assert all(one.skipped for one in refine.run(spark, config).refined.values())
    assert config.annotate is not None
    other = dataclasses.replace(config.annotate, near_duplicates=NearDuplicatesConfig(threshold=0.5))
    job.run(spark, dataclasses.replace(config, annotate=other))
    again = refine.run(spark, config).refined["clean"]
    assert not again.skipped
    assert again.n_instances < refined["clean"].n_instances
    checks = {check.name: check for check in verify.verify(spark, config.root)}
    assert all(check.ok for check in checks.values())


def test_refinement_never_guesses_what_is_not_annotated(spark: Any, copy: ExperimentConfig) -> None:
    scored(spark, copy, [*TEXTS, "new", "newer"])
    write(spark, copy, {"new": (1, "new text"), "newer": (1, "newer text")})
    clean = with_corpora(copy, clean=CorpusConfig(where="duplicate_of is null and n_bytes > 0"))
    with pytest.raises(CorpusError, match=r"found 2 that are not annotated, for example new\w*; run `miniplm"):
        refine.run(spark, clean)
    assert {check.name: check.behind for check in wrong(spark, copy)}["annotations: pool = annotated"] == 2
    shutil.rmtree(storage.local_path(copy.layout.table("annotations")))
    asked = with_corpora(copy, asked=CorpusConfig(where="language = 'en'", score="n_words"))
    with pytest.raises(CorpusError, match=r"language, n_words.*annotate \(language, quality\).*`miniplm annotate`"):
        refine.run(spark, asked)
    with pytest.raises(ConfigError, match=r"no SQL over score_matrix.*langauge"):
        refine.run(spark, with_corpora(copy, asked=CorpusConfig(where="langauge = 'en'")))
    # A corpus that follows the matrix has only the matrix's columns.
    with pytest.raises(ConfigError, match=r"no SQL over score_matrix.*duplicate_of"):
        refine.follow(spark, clean)


@pytest.mark.long
def test_a_take_down_leaves_no_copy_of_nothing(spark: Any, copy: ExperimentConfig) -> None:
    gone = {"z copied", "q3 of it", "zh"}
    found = takedown.take_down(spark, copy, [f"document of {name}" for name in gone], Takedown("a test"))
    assert found.removed == {"annotations": 3, "instances": 3}
    left = rows_of(spark, copy)
    # Rows that named them have to be annotated again: of two copies of a removed text, one is the first now.
    assert TEXTS.keys() - left.keys() == gone | {"x", "y copied", "p3 made"}
    assert {check.name for check in wrong(spark, copy)} == {"annotations: pool = annotated"}
    assert job.run(spark, copy).new_annotated == 3
    rows = rows_of(spark, copy)
    assert rows["x"]["duplicate_of"] is None
    assert rows["y copied"]["duplicate_of"] == "x"
    assert rows["p3 made"]["near_duplicate_of"] is None
    assert wrong(spark, copy) == []
    tended = {one.table: one for one in maintain.maintain(spark, copy).tables}
    assert tended["annotations"].is_merged
    assert rows_of(spark, copy) == rows


def test_the_words_of_a_text_are_looked_for_once(spark: Any) -> None:
    # In a lambda Spark would look for them at every n-gram: hours for a book.
    rows = spark.range(1).selectExpr("'a' AS instance_id", "id AS ingested_at", "concat(id, ' text') AS text")
    pairs = rows.selectExpr("instance_id", "instance_id AS other")
    near = NearDuplicatesConfig()
    for made in (
        duplicates.with_buckets(rows, near),
        duplicates.shingle_sets(pairs, rows, near),
        quality_columns.with_quality(rows),
        contamination.shared_ngrams(
            rows, EvaluationNgrams(spark.range(1).withColumnRenamed("id", "ngram"), 1, 1, 0, ""), 13
        ),
    ):
        plan = made._jdf.queryExecution().optimizedPlan().toString()
        assert plan.count("regexp_extract_all(lower(") == 1, plan


def test_what_is_refused(spark: Any, copy: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(files: str | list[str], **changes: Any) -> ExperimentConfig:
        settings = AnnotateConfig(contamination=ContaminationConfig(files=files, **changes))
        return dataclasses.replace(copy, annotate=settings)

    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n["no object"]\n')
    for name in ("short.txt", "_hidden.txt", "colon/a:b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("few words")
    for config, message in (
        (of(str(tmp_path / "nowhere")), r"annotate\.contamination\.files: .*nowhere matches no file"),
        (of(str(tmp_path / "_hidden.txt")), r"names that begin with _ or \. are hidden from it: .*/_hidden\.txt"),
        (of(str(tmp_path / "colon")), r"annotate\.contamination\.files: 1 files have a colon in their name.*a:b"),
        (of([str(tmp_path / "short.txt"), str(tmp_path / "root")]), "root, found none"),
        (of(str(tmp_path / "bad.jsonl")), r"bad\.jsonl: expected one JSON object per line.*found list"),
        (of(str(tmp_path / "short.txt")), "texts of 13 words or more, found none in 1 records"),
        (dataclasses.replace(copy, annotate=None), "expected a section with this name"),
        (dataclasses.replace(copy, root=str(tmp_path / "empty")), "expected a Delta table"),
    ):
        with pytest.raises((ConfigError, CorpusError), match=message):
            job.run(spark, config)
    monkeypatch.setitem(packages.NEEDED, "language", "py3langid_of_no_one")
    missing = r"annotate.language: expected the package py3langid_of_no_one on every executor.*'miniplm\[annotate\]'"
    with pytest.raises(ConfigError, match=missing):
        job.run(spark, copy)
    assert rows_of(spark, copy).keys() == TEXTS.keys()
