"""Names of input files: formats and globs, files that Spark hides, and names that Spark cannot read. Driver only.

Input: a path, folder or glob as Hadoop expects it (a URI, not percent-encoded). Output: plain paths. Spark's own
listing (inputs.py) decides which files are read. The listing here uses Hadoop's FileSystem, so it works on every
storage that Spark supports, and it finds the files that Spark skips without a message: files whose name, or whose
folder's name, begins with `_` or `.`. Owns the messages about them. Reads no file. A retry lists again.
"""

import contextlib
import dataclasses
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import globs
from miniplm_udf.ingestion.formats import NAMES, PACKED

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

INPUT = "ingest.input"
# The text form of Hadoop's FileStatus. Many of them come as one text, because each call into the JVM is slow.
_STATUS = re.compile(r"\w*\{path=(.*?); isDirectory=(true|false)(?:; length=(\d+))?;", re.DOTALL)
# Files that Spark, Hadoop and Delta write next to their data; they are not reported as left out.
_BOOKKEEPING = re.compile(
    r"/_(SUCCESS|committed_[^/]*|started_[^/]*|metadata|common_metadata)$|\.crc$|\._COPYING_$"
    r"|/(_delta_log|_temporary|_spark_metadata)/"
)
_FOLDERS_ASKED = 16
# Least number of folders that a `**` stands for, and the folders below the deepest existing one that it reaches.
_LEVELS, _NEW_LEVELS = 4, 2
# Records that `datasets.save_to_disk` writes next to its Arrow files; files of `map` and `filter` in the same folder.
_DATASETS_RECORD = re.compile(r"/(dataset_info|dataset_dict|state|dataset_infos)\.json$")
_DATASETS_CACHE = re.compile(r"/cache-[^/]*\.arrow$")
# Spark's own rule (HadoopFSUtils.shouldFilterOutPathName).
_HIDDEN = re.compile(r"/(\.|_(?![^/]*=))[^/]*")


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of the input.

    Attributes:
        path: URI as in Spark's `_metadata.file_path`, percent-encoded.
        modified_micros: modification time, in microseconds since 1970.
        n_bytes: size.
    """

    path: str
    modified_micros: int
    n_bytes: int


def _any_case(name: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" for letter in name)


def glob_filter(names: Sequence[str], packed: Sequence[str]) -> str:
    """Returns a glob for files with some extensions in any case, plain or compressed.

    Args:
        names: extensions without dots.
        packed: suffixes of compressed files, "" for plain files.
    """
    # Hadoop finds codecs by lower-case suffixes only: X.JSONL.GZ would be read without decompression.
    return f"*.{{{','.join(map(_any_case, names))}}}" + (f"{{{','.join(packed)}}}" if len(packed) > 1 else "")


GLOB_FILTERS = {kind: glob_filter(names, PACKED[kind]) for kind, names in NAMES.items()}


def escape_glob(path: str) -> str:
    """Returns the path with its glob characters escaped.

    Args:
        path: a path that is no glob.
    """
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def plain_path(uri: str) -> str:
    """Returns the same name for all URIs of a file, without percent-encoding.

    Args:
        uri: a URI as Spark or Hadoop writes it.
    """
    return unquote(re.sub(r"^file:/+", "file:/", uri))


def existing_or_glob(spark: "SparkSession", path: str, key: str = INPUT) -> str:
    """Returns a path as a glob that Hadoop knows: `**` is expanded, as deep as folders are now and two levels more.

    Its glob characters are escaped if a file or folder has exactly this name.

    Args:
        spark: a session.
        path: the path.
        key: the key of the config that holds the path, for messages.

    Raises:
        ConfigError: Hadoop refuses the path.
    """
    if not globs.has_magic(path):
        return path
    filesystem, place = _filesystem(spark, path, key)
    if filesystem.exists(place):
        return escape_glob(path)
    if not globs.is_recursive(path):
        return path
    start = globs.start_of_recursion(path)
    files = [re.sub(r"^\w+:/+", "", file) for file in all_files(spark, start, key)]
    deepest = max((file.count("/") for file in files), default=0) - re.sub(r"^\w+:/+", "", start).count("/") - 1
    return globs.expand_recursive(path, max(_LEVELS, deepest + _NEW_LEVELS))


def base_folders(paths: Sequence[str], files: Iterable[str]) -> tuple[str, ...]:
    """Returns the folders that the input's paths name, below which the names of files differ.

    Args:
        paths: paths and globs, as `existing_or_glob` returns them.
        files: URIs of the files that they match.

    Returns:
        Plain folders with a slash at the end, the longest first.
    """
    names = [plain_path(file) for file in files]
    bases = set()
    for path in paths:
        fixed = re.split(r"(?<!\\)[\[{*?]", path, maxsplit=1)[0]
        place = re.sub(r"^file:/+", "file:/", re.sub(r"\\(.)", r"\1", fixed))
        is_folder = fixed == path and any(name.startswith(f"{place}/") for name in names)
        bases.add(f"{place}/" if is_folder else place[: place.rfind("/") + 1])
    return tuple(sorted(bases, key=lambda base: (-len(base), base)))


def name_below(path: str, bases: Sequence[str]) -> str:
    """Returns the name of a file below the input's folder; without folders if no base holds the file.

    Args:
        path: URI of the file, percent-encoded.
        bases: the result of `base_folders`.
    """
    plain = plain_path(path)
    base = next((base for base in bases if plain.startswith(base)), plain[: plain.rfind("/") + 1])
    return plain[len(base) :]


def folder_source(path: str, bases: Sequence[str]) -> str | None:
    """Returns the source of a text file: the first folder of its name below the input's folder; None without a folder.

    Args:
        path: URI of the file, percent-encoded.
        bases: the result of `base_folders`.
    """
    return name_below(path, bases).rpartition("/")[0].partition("/")[0] or None


def is_datasets_record(path: str) -> bool:
    """Whether a file is a record that `datasets.save_to_disk` writes; it holds no text.

    Args:
        path: path or URI of the file.
    """
    return bool(_DATASETS_RECORD.search(path))


def is_datasets_cache(path: str) -> bool:
    """Whether a file is one that `datasets` writes for `map` and `filter`: its rows are derived from the data.

    Args:
        path: path or URI of the file.
    """
    return bool(_DATASETS_CACHE.search(path))


def one_path(paths: list[str]) -> str:
    """Returns one glob for several paths, because a file stream takes one path.

    Args:
        paths: paths or globs, at least one.

    Raises:
        ConfigError: the paths are on several file systems.
    """
    if len(paths) == 1:
        return paths[0]
    matches = [re.match(r"^([^:/]+://[^/]*/)(.*)$", path) for path in paths]
    heads = {match.group(1) for match in matches if match}
    if None in matches or len(heads) != 1:
        raise ConfigError(
            f"ingest.input: expected paths on one file system, found {[storage.redact(p) for p in paths]}; "
            "copy them to one place"
        )
    return heads.pop() + "{" + ",".join(_in_braces(match.group(2)) for match in matches if match) + "}"


def _in_braces(path: str) -> str:
    """Escapes a glob for a list in braces: a comma in a name must not end it, and Hadoop, which splits the list first,
    removes one level of escapes.
    """
    depth, escaped = 0, ""
    for part in re.findall(r"\\.|.", path, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(part, 0)
        escaped += ("\\\\" if part.startswith("\\") else "\\" if part == "," and depth <= 0 else "") + part
    return escaped


def all_files(spark: "SparkSession", path: str, key: str = INPUT) -> list[str]:
    """Lists all files at a path, in a folder and all folders below it, or of a glob, including files that Spark hides.

    Args:
        spark: a session.
        path: the path, folder or glob.
        key: the key of the config that holds the path, for messages.

    Returns:
        Paths, without paths of empty files.

    Raises:
        ConfigError: the glob is malformed, or meets a name with a colon.
    """
    filesystem, place = _filesystem(spark, path, key)
    jvm: Any = spark._jvm
    with _named(path, key):
        if globs.has_magic(path):
            statuses = jvm.org.apache.commons.lang3.ArrayUtils.toString(filesystem.globStatus(place))
        else:
            statuses = filesystem.getFileStatus(place).toString() if filesystem.exists(place) else ""
    files = []
    for name, is_folder in _parsed(statuses):
        if is_folder:
            below = filesystem.listFiles(jvm.org.apache.hadoop.fs.Path(name), True)
            listed = jvm.org.apache.hadoop.util.functional.RemoteIterators.toList(below).toString()
            files += [file for file, _ in _parsed(listed)]
        else:
            files.append(name)
    return [re.sub(r"^file:/+", "file:/", file) for file in files]


def _parsed(statuses: str) -> list[tuple[str, bool]]:
    """(path, whether it is a folder) of each status in a text, without empty files, in which no text is left out."""
    groups = (match.groups() for match in _STATUS.finditer(statuses))
    return [(path, is_folder == "true") for path, is_folder, length in groups if length != "0"]


def _filesystem(spark: "SparkSession", path: str, key: str) -> tuple[Any, Any]:
    jvm: Any = spark._jvm
    with _named(path, key):
        place = jvm.org.apache.hadoop.fs.Path(path)
        return place.getFileSystem(spark._jsc.hadoopConfiguration()), place


@contextlib.contextmanager
def _named(path: str, key: str) -> Iterator[None]:
    """Turns the Java errors of the block into a ConfigError that names the path and its key.

    Raises:
        ConfigError: Hadoop refuses the path.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import IllegalArgumentException

    try:
        yield
    except (Py4JJavaError, IllegalArgumentException) as error:
        text = str(error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else error)
        # Hadoop reads the part before a colon as a scheme.
        if "in absolute URI" in text:
            text += "; a glob cannot pass a name with a colon: rename it, or name its folder in place of the glob"
        raise ConfigError(f"{key}: {storage.redact(path)} cannot be listed: {text}") from error


def left_out(files: Iterable[str], kept: Iterable[str]) -> tuple[str, ...]:
    """Names the files that are not read.

    Args:
        files: paths of all files (`all_files`).
        kept: paths that are read, percent-encoded as in Spark's `_metadata`.

    Returns:
        Sorted plain paths; for a hidden folder, its name and the number of its files.
    """
    read, files = set(map(plain_path, kept)), list(files)
    # Folders above the input may be hidden: their files are read.
    base = os.path.commonprefix(files).rfind("/")  # noqa: RUF071  (up to a slash, and of URIs too)
    counts: Counter[str] = Counter()
    for file in files:
        if file in read or _BOOKKEEPING.search(file):
            continue
        hidden = _HIDDEN.search(file, max(base, 0))
        counts[f"{file[: hidden.end()]}/" if hidden and hidden.end() < len(file) else file] += 1
    return tuple(
        storage.redact(name.removeprefix("file:")) + (f" ({n:,} files)" if name.endswith("/") else "")
        for name, n in sorted(counts.items())
    )


def check_names(path: str, files: Iterable[str], key: str = INPUT) -> None:
    """Refuses file names that cannot be read.

    Hadoop allows no colon in the name of a file, nor in any name that a glob goes through. fsspec reads `::` as a chain
    of file systems.

    Args:
        path: the path or glob that the stream will read.
        files: paths, as `all_files` returns them.
        key: the key of the config that holds the path, for messages.

    Raises:
        ConfigError: a name cannot be read; the message has the first unreadable name, and their number.
    """
    is_glob = globs.has_magic(path)
    refused = []
    for file in files:
        place = re.sub(r"^[\w+.-]+:(//[^/]*)?", "", file)
        if ":" in (place if is_glob else place.rpartition("/")[2]) or "::" in place:
            refused.append(file.removeprefix("file:"))
    if refused:
        raise ConfigError(
            f"{key}: {len(refused)} files have a colon in their name{' or in the name of a folder' * is_glob}, "
            f"which Spark cannot read: {storage.redact(sorted(refused)[0])!r}; rename them, for example with - in "
            "place of :"
        )


def check_tables(spark: "SparkSession", files: Iterable[str]) -> None:
    """Refuses files of a Delta table, because they also hold rows that the table removed.

    Searches only the first folders for a log, because each search is a request.

    Args:
        spark: a session.
        files: paths, as `all_files` returns them.

    Raises:
        ConfigError: files belong to a Delta table; the message names it.
    """
    logs = {file.partition("/_delta_log/")[0] for file in files if "/_delta_log/" in file}
    for folder in sorted({file.rpartition("/")[0] for file in files})[:_FOLDERS_ASKED]:
        filesystem, place = _filesystem(spark, f"{folder}/_delta_log", INPUT)
        if filesystem.exists(place):
            logs.add(folder)
    if logs:
        table = storage.redact(min(logs).removeprefix("file:"))
        raise ConfigError(
            f"ingest.input: expected files, or one Delta table by itself, found files of the Delta table {table}; "
            f"set {shlex.quote(f'ingest.input={table}')}"
        )
