"""Decides the format of an input of files by their names; refuses formats that are not read, with the way to convert.

Input: listed files. Output: a format. Owns the rules for folders with several kinds of files: text files next to data
(README.txt) and the records of `datasets` are not counted; JSON files are arrays if one of the first is an array.
Driver only. For `file_format`, executors read the beginnings of some `.json` files; `choose_format` needs no Spark, and
the checks before a command starts use it too. Writes nothing; a retry decides the same.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from miniplm_udf import storage
from miniplm_udf.config.sections import IngestConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.first_rows import holds_arrays
from miniplm_udf.ingestion.formats import SUFFIXES, format_of
from miniplm_udf.ingestion.listing import is_datasets_cache, is_datasets_record, plain_path

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

_CSV = re.compile(r"\.(?i:csv|tsv|tab)(\.\w+)?$")
_JSON = re.compile(r"\.(?i:json)(\.(gz|zst|bz2))?$")


def file_format(spark: "SparkSession", ingest: IngestConfig, files: "Sequence[InputFile]") -> str:
    """Returns the format of the files: the config's, or the format that their names tell.

    Args:
        spark: a session.
        ingest: the paths and the format.
        files: the files.

    Raises:
        ConfigError: the names tell no format or several, or the config expects a Delta table.
    """
    by_path = {file.path: file for file in files}

    def has_arrays(paths: Sequence[str]) -> bool:
        return holds_arrays(spark, [by_path[path] for path in paths])

    return choose_format(ingest, [file.path for file in files], has_arrays)


def choose_format(ingest: IngestConfig, paths: Sequence[str], has_arrays: Callable[[Sequence[str]], bool]) -> str:
    """Returns the config's format, or the format that the names of files tell.

    Args:
        ingest: the paths and the format.
        paths: paths or URIs of the files, percent-encoded; at least one.
        has_arrays: whether one of the first of some `.json` files is a JSON array; gets their sorted paths.

    Raises:
        ConfigError: the names tell no format or several, or the config expects a Delta table.
    """
    if ingest.format == "delta":
        raise ConfigError(
            f"ingest.input: expected a Delta table (a folder with _delta_log), found files: {ingest.inputs}; correct "
            "the path or ingest.format"
        )
    if ingest.format != "auto":
        return ingest.format
    formats = {path: kind for path in paths if (kind := format_of(path)) is not None}
    kinds = {kind for path, kind in formats.items() if not is_datasets_record(path)} or set(formats.values())
    if len(kinds) > 1:
        kinds.discard("text")
    if not kinds:
        raise ConfigError(_no_format(paths))
    jsons = sorted(path for path in paths if _JSON.search(path))
    if "jsonl" in kinds and jsons and has_arrays(jsons):
        kinds.add("JSON arrays")
        if all(_JSON.search(path) for path, kind in formats.items() if kind == "jsonl"):
            kinds.discard("jsonl")
    if len(kinds) > 1:
        raise ConfigError(
            f"ingest.input: expected files of one format, found {sorted(kinds)} among {ingest.inputs}; "
            "ingest one format, for example ingest.input='texts/*.jsonl.gz', and the other after it into the same root"
        )
    return kinds.pop().replace("JSON arrays", "json")


def is_of_format(path: str, kind: str) -> bool:
    """Whether a file's name belongs to a format that the names have told.

    Args:
        path: URI of the file.
        kind: the format.
    """
    if kind == "json":
        return bool(_JSON.search(path))
    return format_of(path) == kind and not is_datasets_cache(path)


def csv_hint(files: "Sequence[str]") -> str | None:
    """Returns how to convert the first CSV file; None if there is none.

    Args:
        files: paths or URIs of files, percent-encoded.
    """
    names = sorted(file for file in files if _CSV.search(file))
    if not names:
        return None
    path = storage.redact(plain_path(names[0]).removeprefix("file:"))
    target, delimiter = _CSV.sub(".parquet", path), "," if ".csv" in path.lower() else "\\t"
    source, result = (json.dumps(name, ensure_ascii=False) for name in (path, target))
    code = (
        "import pyarrow.csv as c, pyarrow.parquet as p; "
        f'p.write_table(c.read_csv({source}, parse_options=c.ParseOptions(delimiter="{delimiter}", '
        f"newlines_in_values=True)), {result})"
    )
    return (
        f"CSV and TSV files are not read, found {path}; write it as Parquet: python -c {shlex.quote(code)} (or in "
        f'Spark: spark.read.csv({source}, header=True, sep="{delimiter}", multiLine=True, escape=\'"\')'
        f".write.parquet({result}))"
    )


def _no_format(paths: Sequence[str]) -> str:
    if hint := csv_hint(paths):
        return f"ingest.input: {hint}"
    return (
        f"ingest.input: expected names that end in {' '.join(s for v in SUFFIXES.values() for s in v)}, found "
        f"{Path(unquote(paths[0])).name!r} and the like; rename the files, or set ingest.format=jsonl, parquet, text, "
        "json or arrow"
    )
