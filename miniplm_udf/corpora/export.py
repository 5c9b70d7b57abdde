"""Exporting a version of a corpus: files with texts, spans and scores, for any other trainer. Driver only.

    refined/<name> at a version + instances -> files (file_writers.py) + manifest.json + README.md, in one new folder

Owns the columns, the manifest and the check that the files hold the version: if their rows do not have its fingerprint,
nothing is published. Rows go to files by a hash of their ids, in no order within a file; texts are joined in one pass,
without a sort. One task writes one file; export_folder.py publishes the whole folder or nothing. A retry, or a second
run with --overwrite, writes the same rows again. An export is a copy: a take-down does not reach it.
"""

import dataclasses
import datetime
import hashlib
import math
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import check
from miniplm_udf.corpora import export_folder, versions
from miniplm_udf.corpora.file_writers import (
    COUNTED,
    FORMATS,
    WRITTEN_DDL,
    ExportedFile,
    WrittenFile,
    write_function,
)
from miniplm_udf.errors import CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.refinement.fingerprints import fingerprint_of, row_hash
from miniplm_udf.revision import code_revision
from miniplm_udf.storage import Json
from miniplm_udf.store import corpus_records, pins, tables
from miniplm_udf.store.provenance import Provenance, VersionTables
from miniplm_udf.store.text_join import MOST_ROWS_PER_PART, texts_of
from miniplm_udf.task_progress import watched_tasks

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

_FILE_FIELDS = [field.name for field in dataclasses.fields(ExportedFile)]
_INSTANCE_COLUMNS = (
    "document_ids", "start_byte", "segment_ends", "starts_document", "ends_document", "stream_id", "ordinal",
    "metadata", "text", "content_hash",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """How to export.

    Attributes:
        to: the format, one of `file_writers.FORMATS`.
        out: path or URI of the folder to make; None is `<root>/exports/<name>-<version>.<to>`.
        rows_per_file: about as many rows as a file, and the task that writes it, gets.
        overwrite: whether an earlier export in the folder is replaced; anything else never is.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an export: what it holds and where it came from. `manifest.json` has the same keys.

    Attributes:
        kind: `export_folder.KIND`.
        corpus: name of the corpus; `version` is the number of the version.
        to: the format.
        exported_at: ISO 8601, UTC.
        code_revision: version of this package that exported; `refined_by` is the version that refined.
        n_instances: rows; `n_tokens` are their tokens, `text_bytes` the UTF-8 bytes of their texts.
        n_candidates: pool rows that passed `where`.
        n_bytes: size of all files.
        threshold: the lowest kept score.
        fingerprint: hash of the ids and scores.
        model_revisions: revision of each model, by alias.
        config: the resolved corpus config.
        inputs: inputs of the version, as in its provenance.
        columns: the meaning of each column, in order.
        files: facts about each file, by its name.
    """

    kind: str = export_folder.KIND
    corpus: str
    version: int
    to: str
    exported_at: str
    code_revision: str
    n_instances: int
    n_candidates: int
    n_tokens: int
    text_bytes: int
    n_bytes: int
    threshold: float
    fingerprint: str
    model_revisions: dict[str, str]
    config: Json
    inputs: VersionTables
    refined_by: str
    columns: dict[str, str]
    files: list[ExportedFile]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSummary(Manifest):
    """The manifest of an export, and the folder: a path or URI without secrets."""

    path: str


@dataclasses.dataclass(frozen=True)
class _ExportedVersion:
    """The version to export, and its provenance."""

    name: str
    number: int
    provenance: Provenance

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def columns(self) -> list[schemas.Column]:
        """The columns of the files, in order: the id, columns of the instance, then columns of the corpus."""
        refined = schemas.refined_as(self.name, self.provenance.config).columns
        of_instances = {column.name: column for column in schemas.INSTANCES.columns}
        return [refined[0], *(of_instances[name] for name in _INSTANCE_COLUMNS), *refined[1:]]


def export(spark: "SparkSession", config: ExperimentConfig, address: str, request: ExportRequest) -> ExportSummary:
    """Writes a version of a corpus to files.

    Args:
        spark: any session.
        config: the experiment.
        address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.
        request: the format and the folder.

    Returns:
        The manifest and the folder.

    Raises:
        ConfigError: the folder exists already, or cannot be made.
        CorpusError: there is no such version; it is empty, its rows are gone, or some of its instances are missing;
            another driver exports to the same folder.
    """
    name, number = versions.find(spark, config.root, address)
    version = _ExportedVersion(name, number, corpus_records.provenance_of(spark, config.root, name, number))
    default = config.layout.exports(f"{name}-{number}.{request.to}")
    target = default if request.out is None else storage.to_uri(request.out)
    storage.check_location("--out", target)
    lease = f"export-{hashlib.sha256(target.encode()).hexdigest()[:16]}"
    with (
        Lease(config.layout.lease(lease), f"the export to {storage.redact(target)}"),
        export_folder.written(target, request.overwrite) as folder,
        corpus_records.readable(name, number),
        watched_tasks(spark, f"export {version}"),
    ):
        files = _write(spark, config, version, request, folder)
        manifest = dataclasses.asdict(_manifest(version, request, files))
        export_folder.remove_others(folder, [file.name for file in files])
        storage.write_text(storage.join(folder, "README.md"), _card(version, request))
        storage.write_json(storage.join(folder, export_folder.MANIFEST), manifest)
    return ExportSummary(**manifest, path=storage.redact(target))


def _write(
    spark: "SparkSession", config: ExperimentConfig, version: _ExportedVersion, request: ExportRequest, folder: str
) -> list[WrittenFile]:
    """Writes the files; returns what the tasks report, by name.

    Raises:
        CorpusError: the files do not hold the version.
    """
    # A take-down changes the rows of a pinned copy, and its counts in `pins`.
    expected = pins.of_version(spark, config.root, version.name, version.number) or version.provenance
    if not expected.n_instances:
        raise CorpusError(f"{version}: expected instances to export, found none in it")
    rows = texts_of(
        corpus_records.read_corpus(spark, config.root, version.name, version.number),
        tables.read(spark, config.layout.table("instances")),
        _INSTANCE_COLUMNS,
        expected.n_instances,
        math.ceil(expected.n_instances / request.rows_per_file),
    )
    columns = [column.name for column in version.columns]
    selected = rows.select(*_written_columns(request.to, columns), *_counted())
    # Sorted on the driver: to sort by range, Spark would run the writing tasks twice.
    written = selected.mapInArrow(write_function(folder, request.to), WRITTEN_DDL).collect()
    files = sorted((WrittenFile(**row.asDict()) for row in written), key=lambda file: file.name)
    _check(version, expected, files)
    missing = {file.name for file in files} - set(storage.list_folder(folder))
    if missing:
        raise CorpusError(
            f"{storage.redact(folder)}: expected the files that tasks have written, missing {len(missing)}, such as "
            f"{min(missing)}; executors on other machines need a folder that all machines share"
        )
    return files


def _written_columns(to: str, columns: list[str]) -> "list[Column]":
    from pyspark.sql import functions as F

    if to == "parquet":
        return [F.col(name) for name in columns]
    # With nulls, so that every line has every key.
    return [F.to_json(F.struct(*columns), {"ignoreNullFields": "false"}).alias("line")]


def _counted() -> "list[Column]":
    """The columns `file_writers.COUNTED`."""
    from pyspark.sql import functions as F

    values = (row_hash(), F.col("n_tokens"), F.octet_length("text").cast("bigint"))
    return [value.alias(name) for value, name in zip(values, COUNTED, strict=True)]


def _check(version: _ExportedVersion, expected: "Provenance | pins.Pin", files: list[WrittenFile]) -> None:
    n_rows = sum(file.n_rows for file in files)
    if n_rows != expected.n_instances:
        raise CorpusError(
            f"{version}: expected its {expected.n_instances} instances, each once in the instances table, found "
            f"{n_rows}; nothing was exported: `miniplm verify` tells more, and `miniplm refine` makes a new version"
        )
    fingerprint = _fingerprint(files)
    if fingerprint != expected.fingerprint:
        raise CorpusError(
            f"{version}: expected rows of the fingerprint {expected.fingerprint}, found {fingerprint}: the rows differ "
            "from the record; nothing was exported: `miniplm verify` tells more"
        )


def _fingerprint(files: list[WrittenFile]) -> str:
    return fingerprint_of([(file.hash_xor, file.hash_sum) for file in files], sum(file.n_rows for file in files))


def _manifest(version: _ExportedVersion, request: ExportRequest, files: list[WrittenFile]) -> Manifest:
    provenance = version.provenance
    return Manifest(
        corpus=version.name,
        version=version.number,
        to=request.to,
        exported_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        code_revision=code_revision(),
        n_instances=sum(file.n_rows for file in files),
        n_candidates=provenance.n_candidates,
        n_tokens=sum(file.n_tokens for file in files),
        text_bytes=sum(file.text_bytes for file in files),
        n_bytes=sum(file.n_bytes for file in files),
        threshold=provenance.threshold,
        fingerprint=_fingerprint(files),
        model_revisions=provenance.model_revisions,
        config=provenance.config,
        inputs=provenance.inputs,
        refined_by=provenance.code_revision,
        columns={column.name: column.meaning for column in version.columns},
        files=[ExportedFile(**{name: getattr(file, name) for name in _FILE_FIELDS}) for file in files],
    )


def _card(version: _ExportedVersion, request: ExportRequest) -> str:
    """The README.md, which tells `datasets` the files and the types that it would otherwise guess from JSON."""
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
