"""Reads packed token sequences from one version of a Delta table, by row number.

Inputs: the URI of a `packed/<corpus>/<tokenizer>` table (schemas.packed) and a version. Outputs: numpy blocks of
token_ids (n, L + 1) int32 and target_mask (n, L) uint8. Row numbers count in the stored order: files sorted by path,
row groups in a file, rows in a row group; the manifest hash identifies that order. Row groups are decoded when they
are first needed and cached up to a limit of bytes.

Uses delta-rs for the file list (miniplm_udf/store/delta_files.py) and pyarrow for the files; needs no JVM. Writes
nothing. A retry reads the same rows, because the files of a version never change.
"""

import dataclasses
import hashlib
import json
import logging
from collections import OrderedDict
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_files, delta_log

LOGGER = logging.getLogger("miniplm.trainer.data")
_CACHE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """The content of `miniplm.json` in a tokenizer folder.

    Attributes:
        document_separator, document_separator_id: the token that ends a document, and its id.
        tokenizer_hash: hash of the tokenizer's files.
        vocab_size: number of token ids.
    """

    document_separator: str
    document_separator_id: int
    tokenizer_hash: str
    vocab_size: int


def read_tokenizer_info(folder_uri: str) -> TokenizerInfo:
    """Reads `miniplm.json` of a tokenizer folder.

    Args:
        folder_uri: URI of the folder.

    Raises:
        CorpusError: the file does not exist: the pack stage has not run.
    """
    raw = storage.read_json(storage.join(folder_uri, "miniplm.json"))
    if raw is None:
        raise CorpusError(
            f"no tokenizer at {storage.redact(folder_uri)} (expected a miniplm.json): run the pack stage to make it"
        )
    return TokenizerInfo(**{field.name: raw[field.name] for field in dataclasses.fields(TokenizerInfo)})


def open_delta(uri: str, version: int | None, made_by: str) -> DeltaTable:
    """Opens a Delta table with delta-rs.

    Args:
        uri: URI of the table.
        version: Delta version; None opens the newest.
        made_by: the stage that writes the table, for the error message.

    Raises:
        CorpusError: the table or version does not exist, or the table has features (deletion vectors, column mapping)
            that make its files alone unreadable.
    """
    shown = storage.redact(uri)
    try:
        return delta_files.open_table(uri, version)
    except TableNotFoundError as error:
        raise CorpusError(f"no Delta table at {shown}: run the {made_by} stage, which writes it") from error
    except DeltaError as error:
        at = "" if version is None else f" at version {version}"
        raise CorpusError(f"the Delta table {shown} cannot be read{at}: {error}") from error


def user_metadata(uri: str, version: int) -> Json | None:
    """Returns the parsed `userMetadata` of the newest commit that has it, up to a version; else None.

    Args:
        uri: URI of the table.
        version: the newest commit that counts.
    """
    metadata = next((found for commit in delta_log.commits(uri, version) if (found := commit.metadata())), None)
    return metadata if isinstance(metadata, dict) else None


@dataclasses.dataclass(frozen=True)
class _RowGroup:
    """One row group of a Parquet file, by its index in the file."""

    path: str
    index: int
    n_rows: int


class PackedSequences:
    """One version of a packed table.

    Args:
        uri: URI of the table.
        version: Delta version; None takes the newest.
        sequence_length: L, tokens of one input (`pack.sequence_length`).
        tokenizer: the tokenizer that the table must have been packed with.

    Attributes:
        uri, version, sequence_length: as above; `version` is never None.
        metadata: `userMetadata` of the table, or None.
        n_sequences: number of rows.
        manifest_hash: hash of the files, row groups and row counts, 32 hexadecimal digits.

    Raises:
        CorpusError: the table is missing or empty, or was packed with another length or tokenizer.
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
        self.metadata = user_metadata(uri, self.version)
        self._vocab_size = tokenizer.vocab_size
        self._check_metadata(tokenizer)
        self._groups = _row_groups(delta_files.files_of(table, uri))
        self._ends = np.cumsum([group.n_rows for group in self._groups], dtype=np.int64)
        self.n_sequences = int(self._ends[-1]) if self._groups else 0
        if self.n_sequences == 0:
            raise CorpusError(
                f"{self.shown} holds no sequences: check what refine kept (`miniplm corpus list`), then run the "
                "pack stage"
            )
        self.manifest_hash = _manifest_hash(self._groups)
        self._cache: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _check_metadata(self, tokenizer: TokenizerInfo) -> None:
        if self.metadata is None:
            LOGGER.warning(
                "%s has no userMetadata: its lineage is unknown, and its tokenizer cannot be checked",
                self.shown,
            )
            return
        expected = {
            "tokenizer_hash": tokenizer.tokenizer_hash,
            "sequence_length": self.sequence_length,
        }
        for key, value in expected.items():
            packed_with = self.metadata.get(key)
            if packed_with is not None and packed_with != value:
                raise CorpusError(
                    f"{self.shown}: expected {key} {value}, found {packed_with} in its metadata: "
                    "run the pack stage again"
                )

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads sequences by row number.

        Args:
            rows: int64 of shape (n,), each in 0 .. n_sequences - 1.

        Returns:
            (token_ids (n, L + 1) int32, target_mask (n, L) uint8), in the order of `rows`.

        Raises:
            CorpusError: a row does not have L + 1 ids, or an id is outside the vocabulary.
        """
        tokens = np.empty((len(rows), self.sequence_length + 1), dtype=np.int32)
        mask = np.empty((len(rows), self.sequence_length), dtype=np.uint8)
        groups = np.searchsorted(self._ends, rows, side="right")
        for group in np.unique(groups):  # each row group is decoded at most once a call
            in_group = groups == group
            positions = rows[in_group] - (self._ends[group] - self._groups[group].n_rows)
            group_tokens, group_mask = self._read(int(group))
            tokens[in_group], mask[in_group] = group_tokens[positions], group_mask[positions]
        return tokens, mask

    def _read(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and masks of a row group, from the cache or the file."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        row_group = self._groups[group]
        with _open(row_group.path) as handle:
            table = pq.ParquetFile(handle).read_row_group(row_group.index, columns=["token_ids", "target_mask"])
        tokens = self._matrix(table["token_ids"], np.dtype("<i4"), self.sequence_length + 1)
        mask = self._matrix(table["target_mask"], np.dtype("u1"), self.sequence_length)
        self._check_ids(tokens)
        self._cache[group] = (tokens, mask)
        while len(self._cache) > 1 and sum(t.nbytes + m.nbytes for t, m in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return tokens, mask

    def _matrix(self, column: pa.ChunkedArray, dtype: np.dtype, width: int) -> np.ndarray:
        """A binary column as an array (rows, width).

        Raises:
            CorpusError: a row has another length.
        """
        values = column.to_pylist()
        size = width * dtype.itemsize
        wrong = next((value for value in values if value is None or len(value) != size), b"")
        if wrong != b"" or (values and size == 0):
            length = "null" if wrong is None else f"{len(wrong) // dtype.itemsize}"
            raise CorpusError(
                f"{self.shown}: expected {width} entries a row (pack.sequence_length {self.sequence_length}), "
                f"found {length}: run the pack stage again"
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
    """Hash of the file names, row groups and row counts in stored order, 32 hexadecimal digits."""
    names = [[group.path.rsplit("/", 1)[-1], group.index, group.n_rows] for group in groups]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]
