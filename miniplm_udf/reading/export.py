"""Taking a version of a corpus away: files with texts, spans and scores, for any other trainer. Driver only.

    refined/<name> at a version + instances -> files (file_writers.py) + manifest.json + README.md, in one new folder

Owns the columns, the manifest and the check that the files hold the version: their rows have its fingerprint, or
nothing is published. Rows go to files by a hash of their ids, in no order within; texts are joined in one pass and not
sorted. A file is written by one task; folders.py sees to it that the folder is there whole or not at all. A retry, or
a second run with --overwrite, writes the same rows again. An export is a copy: a take-down does not reach it.
"""

import dataclasses
import datetime
import hashlib
import math
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, pins, schemas, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.config_sections import check
from miniplm_udf.errors import CorpusError
from miniplm_udf.progress import watched_tasks
from miniplm_udf.reading import folders
from miniplm_udf.reading.file_writers import COUNTED, FORMATS, WRITTEN_DDL, write_function
from miniplm_udf.refinement.refine import fingerprint_of, row_hash
from miniplm_udf.revision import code_revision
from miniplm_udf.streams.lease import Lease, lease_uri
from miniplm_udf.texts import MOST_ROWS_PER_PART, texts_of
from miniplm_udf.upkeep import versions

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

_OF_A_FILE = ("name", "n_bytes", "n_rows", "n_tokens", "text_bytes")
_OF_INSTANCES = (
    "document_ids", "start_byte", "segment_ends", "starts_document", "ends_document", "stream_id", "ordinal",
    "metadata", "text", "content_hash",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """How to export.

    Attributes:
        to: the format.
        out: path or URI of the folder to make; None is `<root>/exports/<name>-<version>.<to>`.
        rows_per_file: about; a task and its file are one.
        overwrite: replaces an export that is there; never anything else.
    """

    to: str = FORMATS[0]
    out: str | None = None
    rows_per_file: int = 100_000
    overwrite: bool = False

    def __post_init__(self) -> None:
        check(self.to in FORMATS, f"--to: expected one of {', '.join(FORMATS)}, found {self.to!r}")
        check(
            1 <= self.rows_per_file <= MOST_ROWS_PER_PART,
            f"--rows-per-file: expected 1 to {MOST_ROWS_PER_PART} rows, found {self.rows_per_file}",
        )


@dataclasses.dataclass(frozen=True)
class _Version:
    """What is exported, and what is recorded of it."""

    name: str
    number: int
    known: corpora.Provenance

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def columns(self) -> list[schemas.Column]:
        """Of the files, in order: those of the instance, then the corpus's."""
        refined = schemas.refined(self.name, self.known.config["models"]).columns
        of_instance = {column.name: column for column in schemas.INSTANCES.columns}
        return [refined[0], *(of_instance[name] for name in _OF_INSTANCES), *refined[1:]]


def export(spark: "SparkSession", config: ExperimentConfig, address: str, request: ExportRequest) -> dict[str, Any]:
    """Writes a version of a corpus to files.

    Args:
        address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.

    Returns:
        The manifest, and `path`, the folder.

    Raises:
        ConfigError: the folder is there already, or cannot be made.
        CorpusError: there is no such version; it is empty, or its rows are gone; its instances are not all there;
            another driver exports to the same folder.
    """
    name, number = versions.find(spark, config.root, address)
    version = _Version(name, number, corpora.provenance_of(spark, config.root, name, number))
    default = storage.join(config.exports_uri, f"{name}-{number}.{request.to}")
    target = default if request.out is None else storage.to_uri(request.out)
    mark = hashlib.sha256(target.encode()).hexdigest()[:16]
    with (
        Lease(lease_uri(config.root, f"export-{mark}"), f"the export to {storage.redact(target)}"),
        folders.written(target, request.overwrite) as folder,
        corpora.readable(name, number),
        watched_tasks(spark, f"export {version}"),
    ):
        files = _write(spark, config, version, request, folder)
        manifest = _manifest(version, request, files)
        folders.remove_others(folder, [file["name"] for file in files])
        storage.write_text(storage.join(folder, "README.md"), _card(version, request))
        storage.write_json(storage.join(folder, folders.MANIFEST), manifest)
    return {**manifest, "path": storage.redact(target)}


def _write(
    spark: "SparkSession", config: ExperimentConfig, version: _Version, request: ExportRequest, folder: str
) -> list[dict[str, Any]]:
    """Writes the files and says what is in each, by name.

    Raises:
        CorpusError: they do not hold the version.
    """
    # A take-down changes the rows of a pin, and says so in its row.
    expected = pins.of_version(spark, config.root, version.name, version.number) or version.known
    if not expected.n_instances:
        raise CorpusError(f"{version}: expected instances to export, found none in it")
    rows = texts_of(
        corpora.read_corpus(spark, config.root, version.name, version.number),
        tables.read(spark, config.table_uri("instances")),
        _OF_INSTANCES,
        expected.n_instances,
        math.ceil(expected.n_instances / request.rows_per_file),
    )
    columns = [column.name for column in version.columns]
    found = rows.select(*_written_columns(request.to, columns), *_counted())
    # Sorted here: Spark would run the tasks twice, the first time to see the range of what it sorts.
    written = found.mapInArrow(write_function(folder, request.to), WRITTEN_DDL).collect()
    files = sorted((row.asDict() for row in written), key=lambda file: file["name"])
    _check(version, expected, files)
    missing = {file["name"] for file in files} - set(storage.list_folder(folder))
    if missing:
        raise CorpusError(
            f"{storage.redact(folder)}: expected the files that tasks have written, missing {len(missing)}, such as "
            f"{min(missing)}; executors on other machines need a place that all share"
        )
    return files


def _written_columns(to: str, columns: list[str]) -> "list[Column]":
    from pyspark.sql import functions as F

    if to == "parquet":
        return [F.col(name) for name in columns]
    # Nulls are written, so that each line has each key.
    return [F.to_json(F.struct(*columns), {"ignoreNullFields": "false"}).alias("line")]


def _counted() -> "list[Column]":
    """The columns COUNTED."""
    from pyspark.sql import functions as F

    values = (row_hash(), F.col("n_tokens"), F.octet_length("text").cast("bigint"))
    return [value.alias(name) for value, name in zip(values, COUNTED, strict=True)]


def _check(version: _Version, expected: "corpora.Provenance | pins.Pin", files: list[dict[str, Any]]) -> None:
    n_rows = _sum(files, "n_rows")
    if n_rows != expected.n_instances:
        raise CorpusError(
            f"{version}: expected its {expected.n_instances} instances, each once in the instances table, found "
            f"{n_rows}; nothing was exported: `miniplm verify` tells more, and `miniplm refine` makes a new version"
        )
    fingerprint = fingerprint_of([(file["hash_xor"], file["hash_sum"]) for file in files], n_rows)
    if fingerprint != expected.fingerprint:
        raise CorpusError(
            f"{version}: expected rows of the fingerprint {expected.fingerprint}, found {fingerprint}: they are not "
            "what was recorded; nothing was exported: `miniplm verify` tells more"
        )


def _sum(files: list[dict[str, Any]], key: str) -> int:
    return sum(file[key] for file in files)


def _manifest(version: _Version, request: ExportRequest, files: list[dict[str, Any]]) -> dict[str, Any]:
    known = version.known
    n_rows = _sum(files, "n_rows")
    return {
        "kind": folders.KIND,
        "corpus": version.name,
        "version": version.number,
        "to": request.to,
        "exported_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_revision": code_revision(),
        "n_instances": n_rows,
        "n_candidates": known.n_candidates,
        "n_tokens": _sum(files, "n_tokens"),
        "text_bytes": _sum(files, "text_bytes"),
        "n_bytes": _sum(files, "n_bytes"),
        "threshold": known.threshold,
        "fingerprint": fingerprint_of([(file["hash_xor"], file["hash_sum"]) for file in files], n_rows),
        "model_revisions": known.model_revisions,
        "config": known.config,
        "inputs": known.inputs,
        "refined_by": known.code_revision,
        "columns": {column.name: column.meaning for column in version.columns},
        "files": [{key: file[key] for key in _OF_A_FILE} for file in files],
    }


def _card(version: _Version, request: ExportRequest) -> str:
    """What `datasets` reads first: the files, and the types, which it would guess from the first lines of JSON."""
    import yaml

    head = {
        "configs": [{"config_name": "default", "data_files": f"*.{request.to}"}],
        "dataset_info": {"features": [_feature(column) for column in version.columns]},
    }
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {version}\n\n"
        "A corpus that `miniplm export` wrote; `manifest.json` tells what it is, where it came from, and what each\n"
        "column means.\n"
    )


def _feature(column: schemas.Column) -> dict[str, str]:
    if column.type.startswith("list<"):
        return {"name": column.name, "list": column.type[len("list<") : -1]}
    return {"name": column.name, "dtype": column.type}
