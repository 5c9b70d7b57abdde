"""Reads a sample of limited size from ingest's input, as rows that ingest's function on the executors takes.

Input: the `Inputs` that ingest would read, and a number of bytes. Output: a `Sample`: an Arrow table of the columns
that `inputs.stream` selects, and the bytes that it was read from. Owns the choice of the places: at most STRATA, evenly
spread over the input's bytes (in a plain file at the place itself, in a compressed file at its start, in Parquet at the
first rows of the file, and in the other formats too). Driver only; Spark reads Parquet and Delta, fsspec all others.
Writes nothing; the same files give the same sample.
"""

import dataclasses
import io
import logging
import random
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

from miniplm_udf.config.sections import IngestConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.formats import WHOLE_FILES
from miniplm_udf.ingestion.inputs import Inputs
from miniplm_udf.ingestion.listing import InputFile, escape_glob
from miniplm_udf.ingestion.parquet_columns import open_file, with_place
from miniplm_udf.ingestion.row_sql import batch_columns
from miniplm_udf.ingestion.whole_files import FileReader

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.estimate")

STRATA = 16
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# Bytes of text in a byte of a compressed file or of Parquet; decides how much is read, and enters no estimate.
_TEXT_PER_COMPRESSED_BYTE = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of the input.

    Attributes:
        rows: `line`, or `text`, `id`, `source`, `metadata`; with `source_file` and `block_start`.
        input_bytes: stored bytes of the whole input.
        read_bytes: stored bytes that the rows were read from.
        n_files: files of the whole input.
        n_tried: files that were opened.
        unreadable: errors of the files that could not be read, by path.
    """

    rows: "pa.Table"
    input_bytes: int
    read_bytes: int
    n_files: int
    n_tried: int
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Size of the whole input, in samples."""
        return self.input_bytes / self.read_bytes


def take_sample(spark: "SparkSession", inputs: Inputs, ingest: IngestConfig, sample_bytes: int) -> Sample:
    """Returns a sample of about `sample_bytes` of text.

    Args:
        spark: a session.
        inputs: the input, as `find_inputs` returns it.
        ingest: names of the fields.
        sample_bytes: bytes of text to read.

    Raises:
        CorpusError: no row could be read.
    """
    if inputs.format == "delta":
        sample = _sample_table(spark, inputs, ingest, sample_bytes)
    elif inputs.format == "parquet":
        sample = _sample_parquet(spark, inputs, ingest, sample_bytes)
    elif inputs.format in WHOLE_FILES:
        sample = _sample_whole_files(inputs, ingest, sample_bytes)
    else:
        sample = _sample_lines(inputs, sample_bytes)
    if not sample.rows.num_rows:
        raise CorpusError(
            f"ingest.input: expected rows to sample in {ingest.inputs}, found none in {sample.n_files} files, of which "
            f"{len(sample.unreadable)} could not be read {list(sample.unreadable.items())[:3]}"
        )
    return sample


@dataclasses.dataclass(frozen=True)
class _Place:
    """A stretch of a file's stored bytes to sample from."""

    file: InputFile
    start: int
    n_bytes: int


def _places(files: tuple[InputFile, ...], stored_bytes: int) -> list[_Place]:
    """Chooses all files if `stored_bytes` are enough for them; else one place in each of STRATA equal shares."""
    total = sum(file.n_bytes for file in files)
    if total <= stored_bytes:
        return [_Place(file, 0, file.n_bytes) for file in files if file.n_bytes]
    rng, share, length = random.Random(0), total / STRATA, max(1, stored_bytes // STRATA)
    points = [(i + rng.random()) * share for i in range(STRATA)]
    places, before = [], 0
    for file in files:
        inside = [point - before for point in points if before <= point < before + file.n_bytes]
        places += [_Place(file, int(point), length) for point in inside]
        before += file.n_bytes
    return places


# --- JSONL ---


def _sample_lines(inputs: Inputs, sample_bytes: int) -> Sample:
    import pyarrow as pa

    packed = any(_codec(file) for file in inputs.files)
    places = _places(inputs.files, sample_bytes // _TEXT_PER_COMPRESSED_BYTE if packed else sample_bytes)
    # A compressed file is read from its start, once. More places than STRATA are whole files, which fit together.
    n_reads = len({place.file.path for place in places}) if packed else len(places)
    limit = sample_bytes if n_reads > STRATA else max(1, sample_bytes // max(1, n_reads))
    rows: list[tuple[bytes, str, int]] = []
    read_bytes, unreadable, tried = 0, {}, set()
    for place in places:
        path = place.file.path
        if path in unreadable or (_codec(place.file) and path in tried):
            continue
        tried.add(path)
        try:
            lines, n_bytes = _lines_at(place, limit)
        except Exception as error:  # whatever the storage's or the codec's library raises
            unreadable[path] = f"{type(error).__name__}: {error}"
            continue
        rows += [(line, path, place.start) for line in lines]
        read_bytes += n_bytes
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    types = (pa.binary(), pa.string(), pa.int64())
    table = pa.table(
        {
            name: pa.array(values, kind)
            for name, values, kind in zip(("line", "source_file", "block_start"), columns, types, strict=True)
        }
    )
    total = sum(file.n_bytes for file in inputs.files)
    return Sample(table, total, max(1, read_bytes), len(inputs.files), len(tried), unreadable)


def _codec(file: InputFile) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if file.path.endswith(suffix)), None)


def _lines_at(place: _Place, limit: int) -> tuple[list[bytes], int]:
    """Reads the lines at a place, about `limit` bytes at most; returns them and the stored bytes that they take."""
    import fsspec

    codec = _codec(place.file)
    with fsspec.open(unquote(place.file.path), "rb") as raw:
        if codec is None:
            raw.seek(place.start)
            if place.start:
                raw.readline()  # skips the rest of a line that begins before the place
            lines = list(_until(raw, place.n_bytes))
            return [line.rstrip(b"\r\n") for line in lines], sum(map(len, lines))
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec) as stream:
            buffered = io.BufferedReader(stream)  # closes the stream when it is collected
            lines, stored_bytes = list(_until(buffered, limit)), raw.tell()
        is_whole = sum(map(len, lines)) < limit
        return [line.rstrip(b"\r\n") for line in lines], place.file.n_bytes if is_whole else stored_bytes


def _until(handle: IO[bytes], limit: int) -> Iterator[bytes]:
    """Yields lines until they have `limit` bytes; at least one line, however long."""
    n_bytes = 0
    while n_bytes < limit and (line := handle.readline()):
        n_bytes += len(line)
        yield line


# --- text, JSON arrays and Arrow ---


def _sample_whole_files(inputs: Inputs, ingest: IngestConfig, sample_bytes: int) -> Sample:
    import pyarrow as pa

    reader, files = inputs.file_reader(ingest.fields), {place.file for place in _places(inputs.files, sample_bytes)}
    limit = max(1, sample_bytes // max(1, min(STRATA, len(files))))
    batches, read_bytes, unreadable = [], 0, {}
    for file in sorted(files, key=lambda file: file.path):
        try:
            rows, n_bytes = _first_rows(reader, file, limit)
        except Exception as error:  # whatever the storage's or the codec's library raises
            unreadable[file.path] = f"{type(error).__name__}: {error}"
            continue
        batches += [with_place(batch, {"source_file": file.path, "block_start": 0}) for batch in rows]
        read_bytes += n_bytes
    total = sum(file.n_bytes for file in inputs.files)
    table = pa.Table.from_batches(batches) if batches else pa.table({})
    return Sample(table, total, max(1, read_bytes), len(inputs.files), len(files), unreadable)


def _first_rows(reader: FileReader, file: InputFile, limit: int) -> "tuple[list[pa.RecordBatch], int]":
    """Reads the first batches of a file, about `limit` bytes; returns them and the stored bytes that they take."""
    rows, n_bytes = [], 0
    with open_file(file.path) as handle:
        for batch in reader.rows(file.path, handle):
            rows.append(batch)
            n_bytes += batch.nbytes
            if n_bytes >= limit:
                return rows, min(file.n_bytes, max(1, handle.tell()))
    return rows, file.n_bytes


# --- Parquet and Delta ---


def _sample_parquet(spark: "SparkSession", inputs: Inputs, ingest: IngestConfig, sample_bytes: int) -> Sample:
    import pyarrow as pa
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    # Files with other column types than most are left out: their texts are assumed to be like the rest.
    regular = tuple(file for file in inputs.files if file not in inputs.odd) or inputs.files
    places = _places(regular, sample_bytes // _TEXT_PER_COMPRESSED_BYTE)
    lengths: dict[InputFile, int] = {}
    for place in places:
        lengths[place.file] = lengths.get(place.file, 0) + place.n_bytes
    tables, read_bytes, unreadable = [], 0, {}
    for file, n_bytes in lengths.items():
        try:
            reader = spark.read if inputs.schema is None else spark.read.schema(inputs.schema)
            frame = reader.parquet(escape_glob(unquote(file.path)))
            n_rows = frame.count()
            share = min(1.0, n_bytes / max(1, file.n_bytes))
            tables.append(_collected(frame, inputs, ingest, file.path, max(1, round(n_rows * share))))
            read_bytes += round(file.n_bytes * tables[-1].num_rows / max(1, n_rows))
        except (Py4JJavaError, PySparkException) as error:
            unreadable[file.path] = str(error).splitlines()[0]
    rows = pa.concat_tables(tables) if tables else pa.table({})
    total = sum(file.n_bytes for file in inputs.files)
    return Sample(rows, total, max(1, read_bytes), len(inputs.files), len(lengths), unreadable)


def _sample_table(spark: "SparkSession", inputs: Inputs, ingest: IngestConfig, sample_bytes: int) -> Sample:
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    ((size, n_files),) = DeltaTable.forPath(spark, inputs.path).detail().select("sizeInBytes", "numFiles").collect()
    frame = spark.read.format("delta").load(inputs.path)
    n_rows = frame.count()
    share = min(1.0, sample_bytes // _TEXT_PER_COMPRESSED_BYTE / max(1, size))
    files = sorted(frame.inputFiles())
    if share < 1 and len(files) > STRATA:
        # The names of Delta's files are unique and, unlike their paths, not percent-encoded.
        chosen = [path.rpartition("/")[2] for path in random.Random(0).sample(files, STRATA)]
        frame = frame.where(F.col("_metadata.file_name").isin(chosen))
    rows = _collected(frame, inputs, ingest, inputs.path, max(1, round(n_rows * share)))
    read_bytes = round(size * rows.num_rows / max(1, n_rows))
    return Sample(rows, int(size), max(1, read_bytes), int(n_files), min(len(files), STRATA))


def _collected(frame: "DataFrame", inputs: Inputs, ingest: IngestConfig, path: str, n_rows: int) -> "pa.Table":
    from pyspark.sql import functions as F

    rows: Any = frame.selectExpr(*batch_columns(inputs.schema, ingest.fields)).limit(n_rows)
    return rows.withColumns({"source_file": F.lit(path), "block_start": F.lit(0).cast("bigint")}).toArrow()
