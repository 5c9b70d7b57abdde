"""Packed token sequences of one version of a Delta table, by row number; read with delta-rs and Arrow, without a JVM.

Inputs: the URI of a `packed/<corpus>/<tokenizer>` table (schemas.packed) and a version. Outputs: numpy blocks of
token_ids (n, L + 1) int32 and target_mask (n, L) uint8. Row numbers are positions in the stored order: files by path,
row groups in a file, rows in a row group; the manifest's hash names that order. Nothing is written; a retry reads the
same rows, since a version's files never change. Row groups are decoded when first needed and kept up to a budget.

Delta-rs gives the file list alone: its own Arrow readers abort the interpreter at exit (ENGINE.md).
"""

import dataclasses
import hashlib
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError

LOGGER = logging.getLogger("miniplm.trainer.data")
_CACHE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """`miniplm.json` of a tokenizer folder: what the trainer knows of a tokenizer."""

    document_separator: str
    document_separator_id: int
    tokenizer_hash: str
    vocab_size: int


def read_tokenizer_info(folder_uri: str) -> TokenizerInfo:
    """Reads `miniplm.json`.

    Raises:
        CorpusError: the folder was not made yet.
    """
    raw = storage.read_json(storage.join(folder_uri, "miniplm.json"))
    if raw is None:
        raise CorpusError(
            f"no tokenizer at {storage.redact(folder_uri)} (expected a miniplm.json): run the pack stage to make it"
        )
    return TokenizerInfo(**{field.name: raw[field.name] for field in dataclasses.fields(TokenizerInfo)})


def open_delta(uri: str, version: int | None, made_by: str) -> DeltaTable:
    """The Delta table at a version (None: the newest).

    Raises:
        CorpusError: there is no such table or version; says that the stage `made_by` makes it.
    """
    shown = storage.redact(uri)
    # Our file: URIs are not percent-encoded (as Hadoop's); delta-rs wants them so.
    location = Path(storage.local_path(uri)).as_uri() if storage.is_local(uri) else uri
    try:
        return DeltaTable(location, version=version)
    except TableNotFoundError as error:
        raise CorpusError(f"no Delta table at {shown}: run the {made_by} stage, which makes it") from error
    except DeltaError as error:
        at = "" if version is None else f" at version {version}"
        raise CorpusError(f"the Delta table {shown} cannot be read{at}: {error}") from error


def file_uris(table: DeltaTable) -> list[str]:
    """The files of a table, sorted by path; local ones as plain paths (delta-rs gives them percent-encoded)."""
    return sorted(unquote(uri) if storage.is_local(uri) else uri for uri in table.file_uris())


def user_metadata(table: DeltaTable) -> dict[str, Any] | None:
    """The parsed `userMetadata` of the newest commit that has one, up to the table's version."""
    # delta-rs lists all commits, and numbers them downwards from the version that is loaded: only right at the newest.
    newest = DeltaTable(table.table_uri)
    behind = newest.version() - table.version()
    for commit in newest.history()[behind:]:
        if commit.get("userMetadata"):
            found = json.loads(commit["userMetadata"])
            return found if isinstance(found, dict) else None
    return None


@dataclasses.dataclass(frozen=True)
class _RowGroup:
    path: str
    index: int
    n_rows: int


class PackedSequences:
    """One version of a packed table.

    Args:
        uri: of the table.
        version: Delta version; None takes the newest there is now.
        sequence_length: L, tokens of one input, as the config states it.
        tokenizer: of the folder that the table must have been packed with.

    Attributes:
        uri, version, metadata, n_sequences, manifest_hash.

    Raises:
        CorpusError: no table, no rows, or packed with another length or tokenizer.
    """

    def __init__(
        self,
        uri: str,
        version: int | None,
        sequence_length: int,
        tokenizer: TokenizerInfo,
    ):
        table = open_delta(uri, version, "pack")
        self.uri, self.version, self.sequence_length = (
            uri,
            int(table.version()),
            sequence_length,
        )
        self.shown = f"{storage.redact(uri)} (version {self.version})"
        self.metadata = user_metadata(table)
        self._vocab_size = tokenizer.vocab_size
        self._check_metadata(tokenizer)
        self._groups = _row_groups(file_uris(table))
        self._ends = np.cumsum([group.n_rows for group in self._groups], dtype=np.int64)
        self.n_sequences = int(self._ends[-1]) if self._groups else 0
        if self.n_sequences == 0:
            raise CorpusError(f"{self.shown} holds no sequences: look at what refine kept, then run the pack stage")
        self.manifest_hash = _manifest_hash(self._groups)
        self._cache: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _check_metadata(self, tokenizer: TokenizerInfo) -> None:
        if self.metadata is None:
            LOGGER.warning(
                "%s has no userMetadata: its lineage is unknown and its tokenizer unchecked",
                self.shown,
            )
            return
        expected = {
            "tokenizer_hash": tokenizer.tokenizer_hash,
            "sequence_length": self.sequence_length,
        }
        for key, value in expected.items():
            found = self.metadata.get(key)
            if found is not None and found != value:
                raise CorpusError(
                    f"{self.shown}: expected {key} {value}, found {found} in its metadata: "
                    "it was packed with another one; run the pack stage again"
                )

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sequences of these row numbers, in their order.

        Args:
            rows: int64 of shape (n,), each in 0 .. n_sequences - 1.

        Returns:
            (token_ids (n, L + 1) int32, target_mask (n, L) uint8).

        Raises:
            CorpusError: a row is not L + 1 ids long, or an id is outside the vocabulary.
        """
        tokens = np.empty((len(rows), self.sequence_length + 1), dtype=np.int32)
        mask = np.empty((len(rows), self.sequence_length), dtype=np.uint8)
        groups = np.searchsorted(self._ends, rows, side="right")
        for group in np.unique(groups):  # each row group is decoded at most once a call
            chosen = groups == group
            places = rows[chosen] - (self._ends[group] - self._groups[group].n_rows)
            group_tokens, group_mask = self._read(int(group))
            tokens[chosen], mask[chosen] = group_tokens[places], group_mask[places]
        return tokens, mask

    def _read(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        found = self._groups[group]
        with _open(found.path) as handle:
            table = pq.ParquetFile(handle).read_row_group(found.index, columns=["token_ids", "target_mask"])
        tokens = self._matrix(table["token_ids"], np.dtype("<i4"), self.sequence_length + 1)
        mask = self._matrix(table["target_mask"], np.dtype("u1"), self.sequence_length)
        self._check_ids(tokens)
        self._cache[group] = (tokens, mask)
        while len(self._cache) > 1 and sum(t.nbytes + m.nbytes for t, m in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return tokens, mask

    def _matrix(self, column: pa.ChunkedArray, dtype: np.dtype, width: int) -> np.ndarray:
        values = column.to_pylist()
        size = width * dtype.itemsize
        wrong = next((value for value in values if value is None or len(value) != size), b"")
        if wrong != b"" or (values and size == 0):
            found = "null" if wrong is None else f"{len(wrong) // dtype.itemsize}"
            raise CorpusError(
                f"{self.shown}: expected {width} entries a row (pack.sequence_length {self.sequence_length}), "
                f"found {found}: run the pack stage again"
            )
        return np.frombuffer(b"".join(values), dtype=dtype).reshape(len(values), width)

    def _check_ids(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if low < 0 or high >= self._vocab_size:
            raise CorpusError(
                f"{self.shown}: expected ids 0 to {self._vocab_size - 1}, its tokenizer's, found {low} to {high}; "
                "the table was packed with another tokenizer; run the pack stage again"
            )


def _open(path: str) -> Any:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.open(inner, "rb")


def _row_groups(paths: list[str]) -> list[_RowGroup]:
    groups = []
    for path in paths:
        with _open(path) as handle:
            metadata = pq.ParquetFile(handle).metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        groups += [_RowGroup(path, index, n_rows) for index, n_rows in enumerate(rows) if n_rows]
    return groups


def _manifest_hash(groups: list[_RowGroup]) -> str:
    """32 hexadecimal digits of the file names, row groups and row counts, in stored order."""
    names = [[group.path.rsplit("/", 1)[-1], group.index, group.n_rows] for group in groups]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]
