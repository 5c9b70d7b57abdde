"""Reads packed token sequences from one version of a Delta table, by row number.

Inputs: the URI of a `packed/<corpus>/<tokenizer>` table (schemas.packed) and a version. Outputs: numpy blocks of
token_ids (n, L + 1) int32 and target_mask (n, L) uint8. Row numbers count in the stored order: files sorted by their
first sequence id, row groups in a file, rows in a row group; the manifest hash identifies that order. Row groups are
decoded when they are first needed; the row groups of about one window of `trainer/loader/order.py` stay in memory.

Uses delta-rs for the file list (miniplm_udf/store/delta_files.py) and pyarrow for the files (packed_files.py); needs no
JVM. Writes nothing. A retry reads the same rows, because the files of a version never change.
"""

import logging
import typing

import numpy as np
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError, first_line
from miniplm_udf.layout import TOKENIZER_RECORD_FILE
from miniplm_udf.packing.file_layout import GROUP_ROWS
from miniplm_udf.store import delta_files, delta_log
from miniplm_udf.store.model_records import TokenizerRecord, read_tokenizer_record
from miniplm_udf.store.provenance import PackedMetadata
from trainer.loader.order import count_lanes
from trainer.loader.packed_files import RowGroupReader, list_row_groups, manifest_hash
from trainer.loader.row_cache import RowCache

LOGGER = logging.getLogger("miniplm.trainer.data")


def read_tokenizer(folder_uri: str) -> TokenizerRecord:
    """Returns `miniplm.json` of a tokenizer folder.

    Args:
        folder_uri: URI of the folder.

    Raises:
        CorpusError: the file does not exist, or lacks a key: the pack stage has not run.
    """
    record = read_tokenizer_record(folder_uri)
    if record is None:
        raise CorpusError(
            f"no tokenizer at {storage.redact(folder_uri)} (expected a {TOKENIZER_RECORD_FILE}): run the pack stage to "
            "make it"
        )
    return record


def open_delta(uri: str, version: int | None, made_by: str) -> DeltaTable:
    """Opens a Delta table with delta-rs.

    Args:
        uri: URI of the table.
        version: Delta version; None opens the newest.
        made_by: the stage that writes the table, for the error message.

    Returns:
        The open table; no data file is read.

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
        raise CorpusError(
            f"the Delta table {shown} cannot be read{at}: {first_line(error)}; restore it from a copy, or delete "
            f"its folder and run the {made_by} stage again"
        ) from error


def user_metadata(uri: str, version: int) -> PackedMetadata | None:
    """Returns the parsed `userMetadata` of the newest commit that has it, up to a version; else None.

    Args:
        uri: URI of the table.
        version: the newest commit that counts.
    """
    metadata = next((found for commit in delta_log.commits(uri, version) if (found := commit.metadata())), None)
    return typing.cast(PackedMetadata, metadata) if isinstance(metadata, dict) else None


class PackedSequences:
    """One version of a packed table.

    Args:
        uri: URI of the table.
        version: Delta version; None takes the newest.
        sequence_length: L, tokens of one input (`pack.sequence_length`).
        tokenizer: the tokenizer that the table must have been packed with.

    Attributes:
        uri, version, sequence_length: the arguments, with the number of the opened version instead of None.
        metadata: `userMetadata` of the table, or None.
        n_sequences: number of rows.
        group_rows: int64 of shape (n_groups,), the rows of each row group in stored order.
        manifest_hash: hash of the files, row groups and row counts, 32 hexadecimal digits.
        cache: the row groups that were used last.

    Raises:
        CorpusError: the table is missing, empty or damaged, or was packed with another length or tokenizer.
    """

    def __init__(
        self,
        uri: str,
        version: int | None,
        sequence_length: int,
        tokenizer: TokenizerRecord,
    ):
        table = open_delta(uri, version, "pack")
        self.uri, self.version, self.sequence_length = (
            uri,
            int(table.version()),
            sequence_length,
        )
        self.shown = f"{storage.redact(uri)} (version {self.version})"
        self.metadata = user_metadata(uri, self.version)
        self._check_metadata(tokenizer)
        self._groups = list_row_groups(delta_files.files_by(table, uri, "sequence_id"))
        self.group_rows = np.array([group.n_rows for group in self._groups], dtype=np.int64)
        self.n_sequences = int(self.group_rows.sum())
        if self.n_sequences == 0:
            raise CorpusError(
                f"{self.shown} holds no sequences: check what refine kept (`miniplm corpus list`), then run the "
                "pack stage"
            )
        self.manifest_hash = manifest_hash(self._groups)
        if (largest := int(self.group_rows.max())) > GROUP_ROWS:
            LOGGER.warning(
                "%s has row groups of %d rows, and the pack stage now writes %d: fewer row groups are shuffled with "
                "each other; delete the table's folder and run the pack stage again for a finer shuffle",
                self.shown, largest, GROUP_ROWS,
            )  # fmt: skip
        self._reader = RowGroupReader(sequence_length, tokenizer.vocab_size)
        lanes = count_lanes(self.group_rows)
        # When a batch crosses from one row group to the next, its lane needs both.
        self.cache = RowCache(self.group_rows, lanes + max(1, lanes // 16), sequence_length, self._read_group)

    def _check_metadata(self, tokenizer: TokenizerRecord) -> None:
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
        """Reads sequences by row number. Thread-safe; concurrent calls run one after the other.

        Args:
            rows: int64 of shape (n,), each in 0 .. n_sequences - 1.

        Returns:
            (token_ids (n, L + 1) int32, target_mask (n, L) uint8), in the order of `rows`.

        Raises:
            CorpusError: a file cannot be read, a row does not have L + 1 ids, or an id is outside the vocabulary.
        """
        return self.cache.get(rows)

    def _read_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        return self._reader.read(self._groups[group])
