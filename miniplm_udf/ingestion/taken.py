"""The files that an ingest query has taken from its input, with their times and sizes. Driver only.

Input: the checkpoint of a query over files. Output: `TakenFile`s. Before a micro-batch reads a file, Spark's log in the
checkpoint (`sources/0`) names the file, its time and the batch of the source that took it; a replay finds the same.
Spark keeps no size: ingest records sizes in `file_sizes` in the checkpoint when the micro-batch begins. A checkpoint of
an earlier release has none.

`file_sizes/<n>` is a JSON object of sizes by plain path, for the micro-batches up to n that no file with a smaller
number holds. Ten files are merged to one, ten merged files again, and so on: a million micro-batches leave at most 54
files.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.ingestion.listing import InputFile, plain_path
from miniplm_udf.streams.checkpoints import newest_finished
from miniplm_udf.streams.offsets import end_offset

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_THREADS = 16
_MERGED = 10
# The suffix of the merged files of the source's log.
_MERGED_NAME = ".compact"


@dataclasses.dataclass(frozen=True)
class TakenFile:
    """A file that the query's source has taken.

    Attributes:
        path: URI as Spark names it, percent-encoded.
        modified_millis: modification time when the file was taken, in milliseconds since 1970.
        batch_id: the source's batch.
        n_bytes: size when the micro-batch began; None if no size was recorded.
    """

    path: str
    modified_millis: int
    batch_id: int
    n_bytes: int | None = None


def taken_files(checkpoint_uri: str) -> list[TakenFile]:
    """Lists all files that the source has taken, including files of an unfinished micro-batch.

    Args:
        checkpoint_uri: checkpoint folder of a query over files.

    Returns:
        The files; empty if the query has taken none.
    """
    taken = _parsed(_all_lines(_source_log(checkpoint_uri)))
    sizes = recorded_sizes(checkpoint_uri) if taken else {}
    return [dataclasses.replace(file, n_bytes=sizes.get(plain_path(file.path))) for file in taken]


def batch_files(spark: "SparkSession", checkpoint_uri: str, batch_id: int) -> list[InputFile]:
    """Returns the files of a micro-batch that has begun, as they are now, without files that were removed.

    Args:
        spark: any session.
        checkpoint_uri: checkpoint folder of a query over files.
        batch_id: number of the micro-batch, from 0.
    """
    first, last = (_source_batch(checkpoint_uri, number) for number in (batch_id - 1, batch_id))
    numbers = range(first + 1, last + 1)
    batches = {number: _parsed(_lines_of(checkpoint_uri, number)) for number in numbers}
    return _states(spark, [f.path for number, files in batches.items() for f in files if f.batch_id == number])


def finished_batch(checkpoint_uri: str) -> int:
    """Finds the newest finished micro-batch of a checkpoint.

    Args:
        checkpoint_uri: the checkpoint folder, which need not exist.

    Returns:
        The number of the micro-batch; -1 before the first.
    """
    newest = newest_finished(checkpoint_uri)
    return -1 if newest is None else newest


def record_sizes(checkpoint_uri: str, batch_id: int, sizes: Mapping[str, int]) -> None:
    """Records the sizes of a micro-batch's files. A replay keeps the sizes that were recorded before it.

    Args:
        checkpoint_uri: checkpoint of the query.
        batch_id: number of the micro-batch.
        sizes: bytes by plain path.
    """
    folder, width = _sizes_folder(checkpoint_uri), 1
    while (batch_id + 1) % (width * _MERGED) == 0:
        width *= _MERGED
    numbers = [batch_id] if width == 1 else _numbers(folder)
    merged = [number for number in numbers if batch_id - width < number <= batch_id]
    all_sizes = dict(sizes)
    for number in merged:
        all_sizes |= storage.read_json(storage.join(folder, str(number))) or {}
    storage.write_json(storage.join(folder, str(batch_id)), all_sizes)
    for number in merged:
        if number != batch_id:
            storage.remove_folder(storage.join(folder, str(number)))


def recorded_sizes(checkpoint_uri: str) -> dict[str, int]:
    """The recorded sizes of all taken files, in bytes, by plain path.

    Args:
        checkpoint_uri: the checkpoint folder of the ingest query.
    """
    folder = _sizes_folder(checkpoint_uri)
    sizes: dict[str, int] = {}
    for number in _numbers(folder):
        sizes |= storage.read_json(storage.join(folder, str(number))) or {}
    return sizes


def changed_since(files: Iterable[InputFile], taken: Iterable[TakenFile]) -> list[str]:
    """Finds the files that changed after they were taken; their new content is not read.

    Args:
        files: the files as they are now.
        taken: the files as they were taken. A file without a recorded size is compared by its time alone.

    Returns:
        Sorted plain paths.
    """
    by_path = {plain_path(file.path): file for file in taken}
    return sorted(
        path for file in files if (before := by_path.get(path := plain_path(file.path))) is not None
        and (file.modified_micros // 1000 != before.modified_millis or before.n_bytes not in (None, file.n_bytes))
    )  # fmt: skip


def growth(files: Iterable[InputFile], taken: Iterable[TakenFile]) -> dict[str, int]:
    """Finds the files that have more bytes than when they were taken.

    Args:
        files: the files as they are now.
        taken: the files as they were taken.

    Returns:
        The bytes that each has more, by plain path.
    """
    sizes = {plain_path(file.path): file.n_bytes for file in taken if file.n_bytes is not None}
    more = {path: file.n_bytes - sizes.get(path, file.n_bytes) for file in files for path in [plain_path(file.path)]}
    return {path: n_bytes for path, n_bytes in more.items() if n_bytes > 0}


def _source_log(checkpoint_uri: str) -> str:
    return storage.join(checkpoint_uri, "sources", "0")


def _sizes_folder(checkpoint_uri: str) -> str:
    return storage.join(checkpoint_uri, "file_sizes")


def _numbers(folder: str) -> list[int]:
    return sorted(int(name) for name in storage.list_folder(folder) if name.isdigit())


def _source_batch(checkpoint_uri: str, batch_id: int) -> int:
    """The source's newest batch in a micro-batch; -1 before the first."""
    offset = end_offset(checkpoint_uri, batch_id)
    return -1 if offset is None else int(offset["logOffset"])


def _lines_of(checkpoint_uri: str, number: int) -> list[str]:
    """The lines of the source's log that hold one batch. Every tenth file of the log holds all earlier batches too."""
    log = _source_log(checkpoint_uri)
    place = storage.join(log, str(number))
    return storage.read_text(place).split("\n") if storage.exists(place) else _all_lines(log)


def _all_lines(log: str) -> list[str]:
    """The lines of the newest merged file of the source's log, and of all files after it."""
    while True:
        names = storage.list_folder(log)
        merged = [int(name.removesuffix(_MERGED_NAME)) for name in names if name.endswith(_MERGED_NAME)]
        newest = max(merged, default=-1)
        after = sorted(int(name) for name in names if name.isdigit() and int(name) > newest)
        wanted = [f"{newest}{_MERGED_NAME}"] * bool(merged) + [str(number) for number in after]
        # Spark merges the files of its log and removes old ones, also while they are read here.
        with contextlib.suppress(FileNotFoundError):
            return [line for name in wanted for line in storage.read_text(storage.join(log, name)).split("\n")]


def _parsed(lines: Iterable[str]) -> list[TakenFile]:
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [TakenFile(e["path"], int(e["timestamp"]), int(e["batchId"])) for e in entries if "path" in e]


def _states(spark: "SparkSession", paths: list[str]) -> list[InputFile]:
    """The current states of files, by one Hadoop request each and without a Spark job."""
    if not paths:
        return []
    from py4j.protocol import Py4JJavaError

    jvm: Any = spark._jvm
    make_uri, make_path = jvm.java.net.URI, jvm.org.apache.hadoop.fs.Path
    filesystem = make_path(make_uri(paths[0])).getFileSystem(spark._jsc.hadoopConfiguration())

    def state(path: str) -> InputFile | None:
        try:
            status = filesystem.getFileStatus(make_path(make_uri(path)))
        except Py4JJavaError as error:
            if error.java_exception.getClass().getSimpleName() != "FileNotFoundException":
                raise
            return None
        # The log has file:///x; `_metadata.file_path`, by which the stream excludes files, has file:/x.
        name = re.sub(r"^file:/+", "file:/", path)
        return InputFile(name, int(status.getModificationTime()) * 1000, int(status.getLen()))

    with ThreadPoolExecutor(_THREADS) as threads:
        return [file for file in threads.map(state, paths) if file is not None]
