"""Benchmark contamination: n-grams of words that a text shares with given evaluation files. Spark; driver only.

    evaluation files -> distinct hashes of their n-grams -> n-grams of each text that are among them

Files are read line by line (`.jsonl`: every string in the line's object counts as a separate text) or whole (`.txt`),
also compressed. A text with fewer than n words has no n-gram, so it cannot be contaminated, nor found. Two different
n-grams with the same 64-bit hash count as equal. Nothing is written; a retry reads the files again.
Source: Brown et al., GPT-3, arXiv 2005.14165, appendix C (13-grams).
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.annotations.words import WORDS, ngram_hashes, plain_form, plain_forms, with_words, words_of_plain
from miniplm_udf.config.annotate import ContaminationConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.inputs import matching, warn_of_left_out
from miniplm_udf.ingestion.listing import (
    InputFile,
    all_files,
    check_names,
    existing_or_glob,
    glob_filter,
    left_out,
    plain_path,
)
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

KEY = "annotate.contamination.files"
_KINDS, _PACKED = ("jsonl", "txt"), ("", ".gz", ".zst")
_SUFFIXES = tuple(f".{kind}{packed}" for kind in _KINDS for packed in _PACKED)
# As for inputs of ingest: the extension in any case, the suffix of a compressed file in lower case.
_NAMES = re.compile(rf"\.(?i:{'|'.join(_KINDS)})({'|'.join(map(re.escape, _PACKED))})$")
# At most this many hashes are sent to every executor; with more, Spark decides.
_BROADCAST_NGRAMS = 20_000_000
_RECORD_DDL = "file string, texts array<string>, problem string"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationCounts:
    """Counts of the evaluation files.

    Attributes:
        ngrams: distinct n-grams.
        records: records.
        short_records: records that are too short for an n-gram.
    """

    ngrams: int
    records: int
    short_records: int


@dataclasses.dataclass(frozen=True)
class EvaluationNgrams:
    """The n-grams of the evaluation files.

    Attributes:
        ngrams: distinct hashes, in the column `ngram`; persisted, so the caller unpersists them.
        n_ngrams: their number.
        n_records: lines and whole files; `n_short` of them have no n-gram.
        fingerprint: fingerprint of the hashes; the names and the order of the files do not matter.
    """

    ngrams: "DataFrame"
    n_ngrams: int
    n_records: int
    n_short: int
    fingerprint: str

    def counts(self) -> EvaluationCounts:
        """Returns the numbers of n-grams and records without the hashes, for the stage's summary."""
        return EvaluationCounts(ngrams=self.n_ngrams, records=self.n_records, short_records=self.n_short)


def files_of(spark: "SparkSession", config: ContaminationConfig) -> list[InputFile]:
    """Returns the evaluation files, sorted by path.

    Args:
        spark: any session.
        config: the section with the `paths` of the files.

    Raises:
        ConfigError: a path has no evaluation file, or a file name that Spark cannot read.
    """
    files = {file for path in config.paths for file in _files_at(spark, path, _spark_path(spark, path))}
    return sorted(files, key=lambda file: file.path)


def _spark_path(spark: "SparkSession", configured: str) -> str:
    return existing_or_glob(spark, storage.to_uri(configured), KEY)


def _files_at(spark: "SparkSession", configured: str, path: str) -> list[InputFile]:
    check_names(path, all_files(spark, path, KEY), KEY)
    files = [file for file in matching(spark, configured, path, KEY) if is_evaluation_file(file.path)]
    if not files:
        raise ConfigError(no_evaluation_file(configured))
    return files


def is_evaluation_file(path: str) -> bool:
    """Whether a file is read as evaluation data, by its name.

    Args:
        path: path or URI of the file.
    """
    return bool(_NAMES.search(path))


def no_evaluation_file(path: str) -> str:
    """Returns the message for a path that has files, of which none is an evaluation file.

    Args:
        path: the path as the config has it.
    """
    return (
        f"{KEY}: expected files ending in {', '.join(_SUFFIXES)} at {storage.redact(path)}, found none; name such files"
    )


def load(spark: "SparkSession", config: ContaminationConfig) -> EvaluationNgrams:
    """Reads the evaluation files.

    Args:
        spark: any session.
        config: the files, and the words of an n-gram.

    Returns:
        Their n-grams.

    Raises:
        ConfigError: a path has no file, a line is not a JSON object, or no text is long enough for an n-gram.
    """
    from pyspark.sql import functions as F

    paths = [_spark_path(spark, path) for path in config.paths]
    all_listed = {file for path in paths for file in all_files(spark, path, KEY)}
    warn_of_left_out(left_out(all_listed, [file.path for file in files_of(spark, config)]), KEY)
    records = _records(spark, paths)
    by_text = F.transform(F.transform("texts", words_of_plain), lambda words: ngram_hashes(words, config.ngram_words))
    hashed = records.select("file", "problem", F.flatten(by_text).alias("ngrams")).persist()
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
            f"{KEY}: expected texts of {config.ngram_words} words or more, found none in {n_records} records"
        )
    return EvaluationNgrams(ngrams, n_ngrams, n_records, n_short, f"{xor & 0xFFFFFFFFFFFFFFFF:016x}-{n_ngrams}")


def _records(spark: "SparkSession", paths: list[str]) -> "DataFrame":
    """The texts of each record, in their plain form, or the problem with it."""
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    plain = arrow_udf(plain_forms, "string", ArrowUDFType.SCALAR)

    def reader(kind: str) -> Any:
        return spark.read.options(pathGlobFilter=glob_filter([kind], _PACKED), recursiveFileLookup="true")

    lines = reader("jsonl").text(paths).selectExpr("CAST(value AS BINARY) AS line", "_metadata.file_path AS file")
    whole = reader("txt").text(paths, wholetext=True)
    return lines.mapInArrow(_records_of_lines, _RECORD_DDL).union(
        whole.select("_metadata.file_path", plain("value").alias("value")).selectExpr(
            "file_path", "array(value)", "CAST(NULL AS STRING)"
        )
    )


def _records_of_lines(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    for batch in batches:
        parsed = [_record_of(line) for line in batch.column("line").to_pylist()]
        kept = [number for number, record in enumerate(parsed) if record is not None]
        records = [record for record in parsed if record is not None]
        columns = {
            "file": batch.column("file").take(pa.array(kept, pa.int64())),
            "texts": [texts for texts, _ in records],
            "problem": [problem for _, problem in records],
        }
        yield pa.RecordBatch.from_pydict(columns, schema=schema_of(_RECORD_DDL))


def _record_of(line: bytes) -> tuple[list[str], str | None] | None:
    """The strings of a line's object and None, or no strings and the problem; None for a blank line."""
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
    """Yields all strings of a JSON value in their plain form, in order; the keys of objects are left out.

    Args:
        record: a parsed JSON value of any type.
    """
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            # No ingested text has an unpaired surrogate, so it may be replaced.
            yield plain_form(value.encode("utf-8", "replace").decode("utf-8"))
        elif isinstance(value, dict | list):
            waiting.extend(reversed(value.values() if isinstance(value, dict) else value))


def _refuse_problems(records: "DataFrame") -> None:
    problems = records.where("problem is not null").select("file", "problem").limit(1).collect()
    if problems:
        raise ConfigError(
            f"{KEY}: {storage.redact(plain_path(problems[0].file))}: expected one JSON object per line, found a line "
            f"that is none: {problems[0].problem}"
        )


def shared_ngrams(rows: "DataFrame", evaluation: EvaluationNgrams, n: int) -> "DataFrame":
    """Counts the n-grams of each text that are in the evaluation files; an n-gram counts at each position.

    Args:
        rows: a frame with instance_id and text.
        evaluation: the evaluation files.
        n: words of an n-gram.

    Returns:
        instance_id, contaminated_ngrams (bigint); only texts that share an n-gram.
    """
    from pyspark.sql import functions as F

    grams = with_words(rows).select("instance_id", F.explode(ngram_hashes(F.col(WORDS), n)).alias("ngram"))
    wanted = F.broadcast(evaluation.ngrams) if evaluation.n_ngrams <= _BROADCAST_NGRAMS else evaluation.ngrams
    shared = grams.join(wanted, "ngram", "left_semi").groupBy("instance_id")
    return shared.agg(F.count("*").alias("contaminated_ngrams"))
