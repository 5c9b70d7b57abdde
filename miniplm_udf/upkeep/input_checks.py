"""Checks of ingest's input before a command starts: files, format, fields of the first rows. Driver only, no Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy. Checks local paths, Delta tables, object
storages and data sets of the hub. Lists the files as fsspec sees them, and reads the first rows of the first files, and
footers; fetches nothing from the hub. Reports only what is certain. A damaged file is left to ingest, and so is a
storage that does not answer in a few seconds, or that Spark may reach in another way than this process. Ingest checks
again with Spark's own listing (ingestion/inputs.py).
"""

import contextvars
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from miniplm_udf import object_storage, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import globs, hub
from miniplm_udf.ingestion.beginnings import N_FIRST, Limits, columns_of, first_holds_array, read_beginning
from miniplm_udf.ingestion.column_kinds import ColumnKind, kinds_of_delta
from miniplm_udf.ingestion.documents import ABSENT, field_names, find_field
from miniplm_udf.ingestion.field_checks import check_text_fields, column_problems, line_problems
from miniplm_udf.ingestion.file_format import choose_format, is_of_format
from miniplm_udf.ingestion.input_files import ListedFile, list_files
from miniplm_udf.ingestion.path_hints import path_hint
from miniplm_udf.storage import Json
from miniplm_udf.storage_errors import explain
from miniplm_udf.store.delta_log import encoded, has_commits
from miniplm_udf.upkeep.storage_probe import connect

LOGGER = logging.getLogger("miniplm.preflight")

KEY = "ingest.input"
# Storages of objects, which fsspec and Spark list alike; memory: is for tests.
_OBJECT_STORES = ("s3a", "s3", "gs", "gcs", "abfs", "abfss", "az", "memory")
_LIMITS = Limits(rows=100, n_bytes=1_000_000)
# Time for everything that is not on this machine, and for a single request.
_SECONDS, _REQUEST_SECONDS = 5.0, 4.0
_CONNECT_SECONDS, _HUB_SECONDS = 2.0, 2.0
_PARQUET_MARK = b"PAR1"
# At most this many footers of Parquet files are read, evenly spaced: a field may be in some of the files only.
_FOOTERS, _REMOTE_FOOTERS = 200, 10
# Bytes of text in a byte of a compressed file, at least; other files hold about as much text as bytes.
_COMPRESSED, _EXPANSION = (".gz", ".zst", ".bz2", ".parquet"), 2


def input_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the input.

    Args:
        config: the experiment.
    """
    inputs = config.ingest.inputs
    if not inputs:
        yield f"{KEY}: expected paths, globs or a Delta table, found nothing; set {KEY}=PATH"
        return
    yield from _overlaps(config)
    if all(map(storage.is_local, inputs)):
        yield from _problems_of(config)
    elif all(storage.is_local(path) or hub.is_on_hub(path) or is_seen_alike(config, path) for path in inputs):
        yield from within_seconds(lambda: list(_problems_of(config)))


def chunking_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields that instances are longer than what the model that counts their tokens reads at once.

    Args:
        config: the experiment.
    """
    chunking = config.ingest.chunking
    model = config.models.get(chunking.tokenizer)
    if model is not None and chunking.max_tokens > model.context_tokens + 1:
        # The last token of an instance is a target only.
        yield (
            f"ingest.chunking.max_tokens: expected at most {model.context_tokens + 1}, models.{chunking.tokenizer}."
            f"context_tokens and one target, found {chunking.max_tokens}: each instance would be scored in several "
            f"windows; set ingest.chunking.max_tokens={model.context_tokens + 1}, or raise context_tokens"
        )


def text_bytes(config: ExperimentConfig) -> int | None:
    """Returns about how many bytes of text the input has, by the sizes of its files; None if it is not local files.

    Args:
        config: the experiment.
    """
    inputs = config.ingest.inputs
    if not inputs or not all(storage.is_local(path) for path in inputs) or any(map(_is_table, inputs)):
        return None
    files = {file for path in inputs for file in list_files(path)}
    return sum(file.n_bytes * (_EXPANSION if file.place.endswith(_COMPRESSED) else 1) for file in files)


def is_seen_alike(config: ExperimentConfig, path: str) -> bool:
    """Whether Spark certainly reaches a path on an object storage in the same way as this process.

    Args:
        config: the experiment.
        path: a path or URI.
    """
    # Spark may be told elsewhere how to reach the storage.
    is_told = any(key.startswith("spark.hadoop.fs.") for key in config.spark.conf)
    return is_object_store(path) and not is_told and not {"PYSPARK_GATEWAY_PORT", "SPARK_CONF_DIR"} & os.environ.keys()


def is_object_store(path: str) -> bool:
    """Whether a path is on an object storage that fsspec lists.

    Args:
        path: a path or URI.
    """
    return not storage.is_local(path) and path.partition("://")[0] in _OBJECT_STORES


def within_seconds(find: Callable[[], list[str]]) -> list[str]:
    """Returns the problems that a function finds in a few seconds; no problems if it takes longer, or fails.

    Args:
        find: looks at places that are not on this machine.
    """
    results: list[list[str]] = []

    def work() -> None:
        try:
            results.append(find())
        except Exception as error:  # a client of a storage that is not installed, or fails: the command will report it
            LOGGER.debug("a check was left out: %r", error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), daemon=True, name="miniplm-checks")
    thread.start()
    thread.join(_SECONDS)
    return results[0] if results else []


def seen_files(key: str, path: str) -> list[ListedFile] | None:
    """Lists the files at a path, as far as it can be done at once.

    Args:
        key: the key of the config that holds the path, for messages.
        path: a path or URI.

    Returns:
        The files; None if it is not known which files there are.

    Raises:
        ConfigError: no file is there, or the storage refuses the request; the message says what to do.
    """
    shown = storage.redact(path)
    try:
        if hub.is_on_hub(path):
            return hub.listed_files(path, _HUB_SECONDS)
        if object_storage.is_s3(path):
            connect(_CONNECT_SECONDS)
        files = list_files(path, None if storage.is_local(path) else _REQUEST_SECONDS)
    except ConfigError as error:
        if str(error).startswith(KEY):
            raise
        raise ConfigError(f"{key}: {shown} cannot be listed: {error}") from error
    except ImportError:  # the client of this storage is not installed here
        return None
    except Exception as error:
        if object_storage.is_s3(path) and (sentence := explain(error)) and not isinstance(error, TimeoutError):
            raise ConfigError(f"{key}: {shown} cannot be listed: {sentence}") from error
        raise
    if not files:
        place = f"relative paths are taken from {Path.cwd()}, and " if storage.is_local(path) else ""
        raise ConfigError(
            f"{key}: {shown} matches no file; correct the path or the pattern ({place}names that begin with _ or . "
            f"are not read){path_hint(path)}"
        )
    return files


def _is_table(path: str) -> bool:
    return not globs.has_magic(path) and has_commits(storage.to_uri(path))


def _overlaps(config: ExperimentConfig) -> Iterator[str]:
    """An input folder that holds the root would be read together with the root's own tables."""
    if not config.root or not storage.is_local(config.root):
        return
    root = Path(storage.local_path(config.root))
    for path in config.ingest.inputs:
        if not storage.is_local(path):
            continue
        folder = Path(storage.local_path(storage.to_uri(path)))
        if folder == root or (folder.is_dir() and folder in root.parents and not _is_table(path)):
            yield (
                f"{KEY}: expected a folder without the root in it, found {folder}, which holds root={root}: ingest "
                "would read the tables that it writes; choose another root, or name the files with a glob"
            )


def _problems_of(config: ExperimentConfig) -> Iterator[str]:
    """Checks the paths of the input, and the files at them."""
    inputs = config.ingest.inputs
    tables = [path for path in inputs if _is_visible_table(path)]
    if tables:
        if config.ingest.format in ("auto", "delta"):
            yield from _table_problems(config, tables)
        return
    every: list[ListedFile] = []
    is_known = True
    for path in inputs:
        try:
            files = seen_files(KEY, path)
        except ConfigError as error:
            yield str(error)
            continue
        is_known = is_known and files is not None
        every += files or []
    if every and is_known:
        yield from _content_problems(config, sorted(set(every)))


def _is_visible_table(path: str) -> bool:
    """Whether there is a Delta table, as far as the storage lets this process see; its refusal is reported later."""
    if storage.is_local(path):
        return _is_table(path)
    try:
        if object_storage.is_s3(path):
            connect(_CONNECT_SECONDS)
        return not hub.is_on_hub(path) and _is_table(path)
    except Exception:
        return False


def _table_problems(config: ExperimentConfig, tables: Sequence[str]) -> Iterator[str]:
    inputs = config.ingest.inputs
    if len(inputs) > 1:
        yield f"{KEY}: expected one Delta table alone, found {inputs}; ingest it by itself"
        return
    columns = _columns_of_table(storage.to_uri(tables[0]))
    yield from column_problems(storage.redact(tables[0]), columns, config.ingest.fields)


def _columns_of_table(uri: str) -> dict[str, ColumnKind]:
    """The columns of a Delta table; none if they cannot be read, which ingest reports."""
    try:
        from deltalake import DeltaTable

        return kinds_of_delta(json.loads(DeltaTable(encoded(uri), without_files=True).schema().to_json()))
    except Exception as error:
        LOGGER.debug("the schema of %s was not checked: %r", storage.redact(uri), error)
        return {}


def _content_problems(config: ExperimentConfig, files: list[ListedFile]) -> Iterator[str]:
    """The format by the names of the files, and the fields of the first rows."""
    ingest = config.ingest
    by_path = {quote(file.place): file for file in files}
    try:
        kind = choose_format(ingest, list(by_path), lambda paths: first_holds_array([by_path[path] for path in paths]))
        if kind == "text":
            check_text_fields(ingest.fields)
    except ConfigError as error:
        yield str(error)
        return
    except ImportError:  # the package for a compression
        return
    kept = [file for path, file in by_path.items() if ingest.format != "auto" or is_of_format(path, kind)]
    if kind in ("jsonl", "json"):
        rows = _first_rows(kind, kept)
        yield from line_problems(_names_in(rows), ingest.fields)
        yield from _no_text(rows, ingest.fields.text)
    elif kind in ("parquet", "arrow"):
        columns = _columns_of_files(kind, kept, ingest.fields)
        problems = list(column_problems(f"the {kind.capitalize()} files", columns, ingest.fields))
        yield from problems
        names = (ingest.fields.text, ingest.fields.id, ingest.fields.source)
        if not problems and any("." in name for name in names):  # perhaps in a column that holds JSON as a string
            yield from line_problems(_names_in(_first_rows(kind, kept)), ingest.fields)
        if kind == "parquet":
            yield from _no_parquet(kept)


def _no_parquet(files: Sequence[ListedFile]) -> Iterator[str]:
    """Files of which not one begins as a Parquet file does; single damaged files are left to ingest."""
    first = _first(files)
    for file in first:
        try:
            with file.open() as handle:
                if handle.read(len(_PARQUET_MARK)) == _PARQUET_MARK:
                    return
        except Exception as error:  # which ingest reports
            LOGGER.debug("%s was not checked: %r", storage.redact(file.place), error)
            return
    if first:
        yield (
            f"ingest.format: expected Parquet files, found {storage.redact(first[0].place)} and the like, which do not "
            "begin with PAR1; set ingest.format=auto, or correct the input"
        )


def _first(files: Sequence[ListedFile]) -> list[ListedFile]:
    """The first files with rows, which ingest checks; none if one of them is not on this machine."""
    first = [file for file in files if file.n_bytes or not file.is_here][:N_FIRST]
    return first if all(file.is_here for file in first) else []


def _first_rows(kind: str, files: Sequence[ListedFile]) -> list[Json]:
    """The first rows that are objects; none if a file cannot be read, which ingest reports."""
    rows: list[Json] = []
    for file in _first(files):
        try:
            rows += [row for row in read_beginning(kind, file, _LIMITS).rows if row is not None]
        except ImportError:  # the package for a compression
            return []
    return rows


def _names_in(rows: Sequence[Json]) -> set[str]:
    return {name for row in rows for name in field_names(row)}


def _no_text(rows: Sequence[Json], name: str) -> Iterator[str]:
    """A text field that holds something else in each of the first rows."""
    values = [value for row in rows if (value := find_field(row, name)) is not ABSENT and value is not None]
    if values and not any(isinstance(value, str) for value in values):
        inner = [each for each in field_names(values[0]) if "." not in each] if isinstance(values[0], dict) else []
        named = f"one of its fields {sorted(inner)}" if inner else "another field"
        yield (
            f"ingest.fields.text: expected a field with text, found {name!r} with {type(values[0]).__name__} in the "
            f"input's first lines; name {named}, with dots"
        )


def _columns_of_files(kind: str, files: Sequence[ListedFile], fields: FieldsConfig) -> dict[str, ColumnKind]:
    """The columns of the files, of a text if one of the files has a text; none if they are not known."""
    chosen = _first(files) if kind == "arrow" else _spread(files)
    columns: dict[str, ColumnKind] = {}
    for file in chosen:
        try:
            read = columns_of(kind, file)
        except ImportError:
            return {}
        except Exception as error:  # a damaged file, which ingest reports
            LOGGER.debug("%s was not checked: %r", storage.redact(file.place), error)
            continue
        columns = {**read, **{name: column for name, column in columns.items() if not _is_better(name, read, column)}}
        if not any(column_problems("", columns, fields)):
            break
    return columns


def _is_better(name: str, columns: dict[str, ColumnKind], known: ColumnKind) -> bool:
    return name in columns and columns[name].is_text and not known.is_text


def _spread(files: Sequence[ListedFile]) -> list[ListedFile]:
    """The files whose footers are read; none if one of them is not on this machine."""
    files = [file for file in files if file.n_bytes or not file.is_here]
    most = _FOOTERS if all(storage.is_local(file.place) for file in files) else _REMOTE_FOOTERS
    chosen = files[:: max(1, -(-len(files) // most))]
    return chosen if all(file.is_here for file in chosen) else []
