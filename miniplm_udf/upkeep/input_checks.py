"""Checks of ingest's input before a command starts: files, format, fields of the first rows. Driver only, no Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy. Looks only at local paths and at Delta
tables: Spark lists other places itself, once it has started (ingestion/inputs.py, which checks again). Reads the first
lines of the first files, and footers of Parquet files. Reports only what is certain.
"""

import glob
import itertools
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.documents import field_names
from miniplm_udf.ingestion.field_checks import no_field
from miniplm_udf.ingestion.formats import SUFFIXES
from miniplm_udf.ingestion.unpacking import unpacked_chunks
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits

KEY = "ingest.input"
_FILES, _LINES = 5, 100
_FIRST_BYTES = 1_000_000
_GLOB = re.compile(r"[\[\]{}*?\\]")
_BRACES = re.compile(r"\{([^{}]*)\}")
# Bytes of text in a byte of a compressed file, at least; other files hold about as much text as bytes.
_COMPRESSED, _EXPANSION = (".gz", ".zst", ".bz2", ".parquet"), 2
_TABULAR = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")


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
    if not all(storage.is_local(path) for path in inputs) or any(map(_is_table, inputs)):
        return
    every: list[Path] = []
    for path in inputs:
        files = local_files(path)
        if not files:
            yield (
                f"{KEY}: {path} matches no file; correct the path or the pattern (relative paths are taken from "
                f"{Path.cwd()}, and names that begin with _ or . are not read)"
            )
        every += files
    if every:
        yield from _content_problems(config, every)


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


def _is_table(path: str) -> bool:
    return has_commits(storage.to_uri(path))


def text_bytes(config: ExperimentConfig) -> int | None:
    """Returns about how many bytes of text the input has, by the sizes of its files; None if it is not local files.

    Args:
        config: the experiment.
    """
    inputs = config.ingest.inputs
    if not inputs or not all(storage.is_local(path) for path in inputs) or any(map(_is_table, inputs)):
        return None
    files = {file for path in inputs for file in local_files(path)}
    return sum(file.stat().st_size * (_EXPANSION if file.suffix in _COMPRESSED else 1) for file in files)


def local_files(path: str) -> list[Path]:
    """Returns the files of a local path, folder or glob, sorted, without those that Spark hides.

    Args:
        path: the path as the config has it.
    """
    plain = storage.local_path(storage.to_uri(path))
    places = [plain] if not _GLOB.search(plain) or Path(plain).exists() else _globbed(plain)
    files: list[Path] = []
    for place in map(Path, places):
        below = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else []
        files += [file for file in below if not _is_hidden(file, place)] if below else [place] * place.is_file()
    return sorted(set(files))


def _globbed(pattern: str) -> list[str]:
    """The names that a glob of Hadoop matches; it may have alternatives in braces."""
    if (braces := _BRACES.search(pattern)) is None:
        # Hadoop escapes a character by \\ and negates a set by ^.
        pattern = re.sub(r"\\(.)", r"[\1]", pattern).replace("[^", "[!")
        return glob.glob(pattern, recursive=True, include_hidden=False)
    parts = (pattern[: braces.start()] + part + pattern[braces.end() :] for part in braces.group(1).split(","))
    return list(itertools.chain.from_iterable(map(_globbed, parts)))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _overlaps(config: ExperimentConfig) -> Iterator[str]:
    """An input folder that holds the root would be read together with the root's own tables."""
    if not storage.is_local(config.root):
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


def _content_problems(config: ExperimentConfig, files: list[Path]) -> Iterator[str]:
    """The format by the names of the files, and the fields of the first rows."""
    kind: str | None = config.ingest.format
    if kind == "delta":
        places = ", ".join(config.ingest.inputs)
        yield f"{KEY}: expected a Delta table (a folder with _delta_log), found files: {places}; correct ingest.format"
        return
    if kind == "auto":
        kinds = {kind for file in files if (kind := _format(file))}
        if len(kinds) > 1:
            kinds.discard("text")  # a README next to the files
        if "arrow" in kinds:
            kinds.discard("jsonl")  # the records of a data set next to its files
        if not kinds:
            yield _unknown_format(files[0])
        if len(kinds) > 1:
            yield (
                f"{KEY}: expected files of one format, found {' and '.join(sorted(kinds))} among "
                f"{', '.join(config.ingest.inputs)}; ingest one format, for example {KEY}='texts/*.jsonl.gz'"
            )
        if len(kinds) != 1:
            return
        (kind,) = kinds
        files = [file for file in files if _format(file) == kind]
    first = [file for file in files if file.stat().st_size][:_FILES]
    if kind == "jsonl":
        yield from _line_problems(config.ingest.fields, first)
    elif kind == "parquet":
        yield from _parquet_problems(config.ingest.fields, first)


def _format(file: Path) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if file.name.lower().endswith(suffixes)), None)


def _unknown_format(file: Path) -> str:
    suffixes = " ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    if file.name.lower().endswith(_TABULAR):
        separator = ", sep='\\t'" if ".tsv" in file.name.lower() else ""
        return (
            f"{KEY}: expected names that end in {suffixes}, found {file.name!r}: CSV is not read, because its quotes "
            'and line breaks have no one meaning; convert it, for example with python -c "import pandas; '
            f"pandas.read_csv('{file.name}'{separator}).to_parquet('texts.parquet')\""
        )
    return (
        f"{KEY}: expected names that end in {suffixes}, found {file.name!r} and the like; rename the files, or set "
        "ingest.format=jsonl or ingest.format=parquet"
    )


def _required(fields: FieldsConfig) -> dict[str, str]:
    """The fields that the input must have, by key: the text, and names that are not defaults."""
    default = FieldsConfig()
    named = {key: getattr(fields, key) for key in ("id", "source")}
    return {"text": fields.text} | {key: name for key, name in named.items() if name != getattr(default, key)}


def _line_problems(fields: FieldsConfig, files: list[Path]) -> Iterator[str]:
    names: set[str] = set()
    required = _required(fields)
    for file in files:
        names.update(_first_names(file))
        if names.issuperset(required.values()):
            return
    if names:
        yield from (
            no_field(key, name, names, "the input's first lines") for key, name in required.items() if name not in names
        )


def _first_names(file: Path) -> set[str]:
    """The names of the fields in the first lines of a file; none if it cannot be read, which ingest reports."""
    names: set[str] = set()
    for line in _first_lines(file):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            continue
        names.update(_names_in(row) if isinstance(row, dict) else ())
    return names


def _names_in(row: Json) -> Iterator[str]:
    """The names of the fields of a row, also of those in texts that are JSON objects."""
    yield from field_names(row)
    for key, value in row.items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                inner = json.loads(value)
            except (ValueError, RecursionError):
                continue
            yield from (f"{key}.{name}" for name in field_names(inner))


def _first_lines(file: Path) -> list[bytes]:
    content = b""
    try:
        with file.open("rb") as handle:
            for chunk in unpacked_chunks(file.name, handle):
                content += chunk
                if len(content) >= _FIRST_BYTES:
                    break
    except Exception:  # a damaged file, or a package for its compression that only executors have
        return []
    return content.split(b"\n")[:_LINES]


def _parquet_problems(fields: FieldsConfig, files: list[Path]) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        return
    names: set[str] = set()
    for file in files:
        try:
            names.update(pq.read_schema(file).names)
        except Exception:  # a damaged file, which ingest reports
            continue
    if names:
        required = [*_required(fields).items(), *(("metadata", name) for name in fields.metadata)]
        missing = [(key, name) for key, name in required if not _is_in(name, names)]
        yield from (no_field(key, name, names, "the Parquet files") for key, name in missing)


def _is_in(name: str, columns: Collection[str]) -> bool:
    """Whether a column has this name, or a column may hold the field: a struct, or a string with an object as JSON."""
    return any(name == column or name.startswith(f"{column}.") for column in columns)
