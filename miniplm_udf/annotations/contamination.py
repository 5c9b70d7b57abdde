"""Benchmark contamination: n-grams of words that a text shares with given evaluation files. Spark; driver only.

    evaluation files -> their n-grams' hashes (distinct) -> n-grams of each text that are among them

Files are read line by line (`.jsonl`: every string in the line's object is a text of its own) or whole (`.txt`), also
compressed. A text of fewer than n words has no n-gram, so it can neither be contaminated nor be found. Two different
n-grams of one 64-bit hash are taken for one. Nothing is written; a retry reads the files again.
Source: Brown et al., GPT-3, arXiv 2005.14165, appendix C (13-grams).
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.annotations.words import WORDS, ngram_hashes, with_words, words
from miniplm_udf.config_annotate import ContaminationConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.inputs import InputFile, list_files, plain_path

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

_PACKED = ("", ".gz", ".zst")
_SUFFIXES = tuple(f".{kind}{packed}" for kind in ("jsonl", "txt") for packed in _PACKED)
# So many hashes are sent to every executor; of more, Spark decides.
_BROADCAST_NGRAMS = 20_000_000
_RECORD_DDL = "file string, texts array<string>, problem string"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What evaluation files hold.

    Attributes:
        ngrams: distinct hashes, as the one column `ngram`, kept; `unpersist` them.
        n_ngrams: their number.
        n_records: lines and texts; `n_short` of them have no n-gram.
        fingerprint: of the hashes, whatever the files' names and order.
    """

    ngrams: "DataFrame"
    n_ngrams: int
    n_records: int
    n_short: int
    fingerprint: str


def files_of(spark: "SparkSession", config: ContaminationConfig) -> list[InputFile]:
    """The evaluation files that are there now, by path.

    Raises:
        ConfigError: a path of the config has none.
    """
    found: set[InputFile] = set()
    for path in config.paths:
        files = [file for file in list_files(spark, storage.to_uri(path)) if file.path.endswith(_SUFFIXES)]
        if not files:
            raise ConfigError(
                f"annotate.contamination.files: expected files ending in {', '.join(_SUFFIXES)} at "
                f"{storage.redact(path)}, found none"
            )
        found.update(files)
    return sorted(found, key=lambda file: file.path)


def load(spark: "SparkSession", config: ContaminationConfig) -> Evaluation:
    """Reads the evaluation files.

    Raises:
        ConfigError: a path has no file, a line is no JSON object, or no text is long enough for an n-gram.
    """
    from pyspark.sql import functions as F

    files_of(spark, config)
    records = _records(spark, [storage.to_uri(path) for path in config.paths])
    of_texts = F.transform(F.transform("texts", words), lambda found: ngram_hashes(found, config.ngram_words))
    hashed = records.select("file", "problem", F.flatten(of_texts).alias("ngrams")).persist()
    ngrams = hashed.select(F.explode("ngrams").alias("ngram")).distinct().persist()
    try:
        _refuse_problems(hashed)
        n_records, n_short = hashed.agg(F.count("*"), F.count_if(F.size("ngrams") == 0)).collect()[0]
        n_ngrams, xor = ngrams.agg(F.count("*"), F.bit_xor("ngram")).collect()[0]
    except BaseException:
        ngrams.unpersist()
        raise
    finally:
        hashed.unpersist()
    if n_ngrams == 0:
        ngrams.unpersist()
        raise ConfigError(
            f"annotate.contamination.files: expected texts of {config.ngram_words} words or more, found none in "
            f"{n_records} records"
        )
    return Evaluation(ngrams, n_ngrams, n_records, n_short, f"{xor & 0xFFFFFFFFFFFFFFFF:016x}-{n_ngrams}")


def _records(spark: "SparkSession", paths: list[str]) -> "DataFrame":
    """Texts by record, or what is wrong with it."""

    def reader(kind: str) -> Any:
        return spark.read.options(pathGlobFilter=f"*.{kind}{{,.gz,.zst}}", recursiveFileLookup="true")

    lines = reader("jsonl").text(paths).selectExpr("CAST(value AS BINARY) AS line", "_metadata.file_path AS file")
    whole = reader("txt").text(paths, wholetext=True)
    return lines.mapInArrow(_records_of_lines, _RECORD_DDL).union(
        whole.selectExpr("_metadata.file_path", "array(value)", "CAST(NULL AS STRING)")
    )


def _records_of_lines(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    for batch in batches:
        read = [_record_of(line) for line in batch.column("line").to_pylist()]
        kept = [number for number, record in enumerate(read) if record is not None]
        records = [record for record in read if record is not None]
        columns = [
            batch.column("file").take(pa.array(kept, pa.int64())).cast(pa.string()),
            pa.array([texts for texts, _ in records], pa.list_(pa.string())),
            pa.array([problem for _, problem in records], pa.string()),
        ]
        yield pa.RecordBatch.from_arrays(columns, names=["file", "texts", "problem"])


def _record_of(line: bytes) -> tuple[list[str], str | None] | None:
    """The strings of a line's object, or what is wrong with it; None for a blank line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return [], f"{type(error).__name__}: {error}"
    if not isinstance(record, dict):
        return [], f"expected a JSON object, found {type(record).__name__}"
    return list(strings_of(record)), None


def strings_of(record: Any) -> Iterator[str]:
    """All strings of a JSON value, in order; keys are none."""
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            # An unpaired surrogate is in no text that was ingested.
            yield value.encode("utf-8", "replace").decode("utf-8")
        elif isinstance(value, dict | list):
            waiting.extend(reversed(value.values() if isinstance(value, dict) else value))


def _refuse_problems(records: "DataFrame") -> None:
    found = records.where("problem is not null").select("file", "problem").limit(1).collect()
    if found:
        raise ConfigError(
            f"annotate.contamination.files: {storage.redact(plain_path(found[0].file))}: expected a JSON object a "
            f"line, found a line that is none: {found[0].problem}"
        )


def shared_ngrams(rows: "DataFrame", evaluation: Evaluation, n: int) -> "DataFrame":
    """Of the rows that share any, how many of their n-grams, counted where they stand, are in the evaluation files.

    Args:
        rows: with instance_id and text.

    Returns:
        instance_id, contaminated_ngrams.
    """
    from pyspark.sql import functions as F

    grams = with_words(rows).select("instance_id", F.explode(ngram_hashes(F.col(WORDS), n)).alias("ngram"))
    known = F.broadcast(evaluation.ngrams) if evaluation.n_ngrams <= _BROADCAST_NGRAMS else evaluation.ngrams
    found = grams.join(known, "ngram", "left_semi").groupBy("instance_id")
    return found.agg(F.count("*").alias("contaminated_ngrams"))
