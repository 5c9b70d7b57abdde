"""The trainer's loader next to a memory-mapped file of the same tokens, and the costs of a table of the paper's size.

    python -m tests.bench.bench_loader [--sequences 2500000] [--batch 512] [--folder build/bench/loader]

Writes a packed table of random tokens with the frequencies of text (Zipf, 151,936 ids, sequences of 1,024 tokens), and
the same token ids and masks as two plain files, and removes all. Each loader reads an epoch as int64 ids and uint8
masks in a process of its own, all on the same core, in turns, so that other work on the machine slows each of them. The
plain files are mapped into memory and read in a permutation of all rows. "From the disk": before each turn, the files
are removed from the system's cache, as if they were much larger than the memory. "From the system's cache": a quarter
of the rows, in each codec. Then a table with the files and row groups of the paper's 48.8 million sequences, each of 2
tokens, is opened, batches of its order are computed, and batches of an epoch are read. Prints four tables and writes
`build/bench/loader.json`.

    M tokens/s              input tokens over the seconds of the loader's turns
    ... per processor s     input tokens over the processor seconds of all threads of the loader
    decoded                 rows decoded over rows read; the limit is 1: each row is decoded once
    peak MB                 growth of resident memory without mapped files, from before the table is opened
    same row group          other sequences of a batch that are from the row group of a sequence, on average

With the default, the table takes 5 GB of disk and the plain files 13 GB.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import mmap
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from deltalake import CommitProperties, Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.packing.file_layout import FILE_ROWS
from tests.bench import results
from tests.support.packed_tables import SCHEMA, packed_batch, write_rows
from trainer.loader.batches import Batches
from trainer.loader.data import PackedSequences, TokenizerInfo
from trainer.loader.order import RowOrder
from trainer.ranks.distributed import World

LENGTH, VOCABULARY = 1024, 151_936
ROW_BYTES = 4 * (LENGTH + 1) + LENGTH
PAPER_FILES = 745  # of FILE_ROWS rows: 48.8 million sequences
READ_BATCHES = 200
TURN_STEPS = 100
CODECS = ("ZSTD", "LZ4_RAW", "SNAPPY", "UNCOMPRESSED")  # the first one is the pack stage's
MAPPED = "memory-mapped file"
PLAIN_FILES = ("tokens.bin", "mask.bin")
METADATA = {"corpus": "random"}
INFO = TokenizerInfo(document_separator="x", document_separator_id=0, tokenizer_hash="h", vocab_size=VOCABULARY)


@functools.cache
def random_tokens() -> np.ndarray:
    """Token ids with the frequencies of text, from which sequences are cut."""
    generator = np.random.default_rng(0)
    frequencies = np.cumsum(1 / np.arange(1, VOCABULARY + 1) ** 1.07)
    ids = generator.permutation(VOCABULARY).astype("<i4")
    return ids[np.searchsorted(frequencies, generator.random(1 << 24) * frequencies[-1])]


def random_rows(n_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of token ids (n, L + 1) and masks (n, L); one sequence in eight has a position without a target."""
    generator, tokens = np.random.default_rng(1), random_tokens()
    for start in range(0, n_rows, 8192):
        n = min(8192, n_rows - start)
        begins = generator.integers(0, len(tokens) - LENGTH - 1, n)
        mask = np.ones((n, LENGTH), np.uint8)
        mask[::8, generator.integers(0, LENGTH)] = 0
        yield np.stack([tokens[begin : begin + LENGTH + 1] for begin in begins]), mask


def write_tables(folder: Path, n_rows: int, codecs: Sequence[str]) -> None:
    """Writes a packed table for each codec, in a folder of its name, and the same rows as two plain files."""
    folder.mkdir(parents=True)

    def batches(codec: str) -> Iterator[pa.RecordBatch]:
        first = 0
        with contextlib.ExitStack() as stack:
            is_first = codec == codecs[0]
            plain = [stack.enter_context(open(folder / name, "wb")) for name in PLAIN_FILES if is_first]
            for rows in random_rows(n_rows):
                for file, values in zip(plain, rows, strict=False):
                    file.write(values.data)
                yield packed_batch(first, *rows)
                first += len(rows[0])

    for codec in codecs:
        write_rows(folder / codec, batches(codec), METADATA, compression=codec, bytes_per_row=ROW_BYTES)
    os.sync()  # pages that are not written yet stay in the system's cache


def size_of(folder: Path) -> int:
    """Bytes of a table's data files."""
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))


class MappedFile:
    """The plain files in memory, read in a permutation of all rows."""

    rows_decoded = 0  # nothing has to be decoded

    def __init__(self, folder: Path, batch: int):
        self._files = [np.memmap(folder / PLAIN_FILES[0], "<i4", "r"), np.memmap(folder / PLAIN_FILES[1], "u1", "r")]
        self._columns = [self._files[0].reshape(-1, LENGTH + 1), self._files[1].reshape(-1, LENGTH)]
        self._rows = np.random.default_rng(0).permutation(len(self._columns[0]))
        self._batch = batch

    def read(self, steps: range) -> None:
        """Reads the batches of some steps. Then gives up the mapped pages, which the system would keep in its cache."""
        for step in steps:
            rows = self._rows[step * self._batch : (step + 1) * self._batch]
            tokens, _ = (torch.from_numpy(column[rows]) for column in self._columns)
            tokens.to(torch.int64)
        for file in self._files:
            file._mmap.madvise(mmap.MADV_DONTNEED)


def drop_from_cache(folder: Path) -> None:
    """Removes the files below a folder from the system's cache, as if they were much larger than the memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakMemory:
    """The highest resident memory of this process that a thread sees while the block runs, in bytes.

    Pages of a memory-mapped file are not counted: the system takes them back.
    """

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self._anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._anonymous())

    def growth(self) -> int:
        """Bytes above the start, at the highest point so far."""
        self.peak = max(self.peak, self._anonymous())
        return self.peak - self.start

    @staticmethod
    def _anonymous() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared


@dataclasses.dataclass
class Measures:
    """The costs of the steps of a loader: seconds until it was open, seconds of its turns, bytes, decoded rows."""

    start_seconds: float
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int = 0
    rows_decoded: int = 0


class Packed:
    """The trainer's loader on one rank."""

    def __init__(self, table: Path, batch: int):
        self._sequences = PackedSequences(table.as_uri(), None, LENGTH, INFO)
        self._batches = Batches(self._sequences, TrainConfig(batch_sequences=batch), World())

    @property
    def rows_decoded(self) -> int:
        """Rows of the row groups that were decoded so far."""
        return self._sequences.cache.rows_decoded

    def read(self, steps: range) -> None:
        """Reads the batches of some steps, ahead of their use."""
        with self._batches.read_ahead(steps.start, steps.stop):
            for step in steps:
                self._batches.get(step)


def serve(name: str, folder: Path, batch: int, pipe: Connection) -> None:
    """A process with one loader on one core: reads the steps that it is asked for, then sends its measures."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        started = time.perf_counter()
        loader = MappedFile(folder, batch) if name == MAPPED else Packed(folder / name, batch)
        measures, used = Measures(time.perf_counter() - started), time.process_time()
        pipe.send("ready")
        while (turn := pipe.recv()) is not None:
            started = time.perf_counter()
            loader.read(turn)
            measures.seconds += time.perf_counter() - started
            pipe.send("done")
        measures.processor_seconds = time.process_time() - used
        measures.peak_bytes, measures.rows_decoded = memory.growth(), loader.rows_decoded
        pipe.send(measures)


def compare(folder: Path, names: Sequence[str], batch: int, steps: int, from_disk: bool) -> dict[str, Measures]:
    """Reads the same number of steps with each loader, in turns, from the system's cache or from the disk."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name in names:
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, folder, batch, far_end)))
        processes[-1].start()
        pipes[name].recv()
    for first in range(0, steps, TURN_STEPS):
        for pipe in pipes.values():
            if from_disk:
                drop_from_cache(folder)
            pipe.send(range(first, min(steps, first + TURN_STEPS)))
            pipe.recv()
    for pipe in pipes.values():
        pipe.send(None)
    measures = {name: pipe.recv() for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return measures


def loader_rows(folder: Path, measures: dict[str, Measures], n_rows: int) -> list[dict[str, Any]]:
    """The rows of a table of loaders, which have read so many rows; ratios are over the memory-mapped file."""
    mapped = measures[MAPPED]
    return [
        {
            "loader": name,
            "GB": (n_rows * ROW_BYTES if name == MAPPED else size_of(folder / name)) / 1e9,
            "M tokens/s": n_rows * LENGTH / m.seconds / 1e6,
            "ratio": mapped.seconds / m.seconds,
            "M tokens/processor s": n_rows * LENGTH / m.processor_seconds / 1e6,
            "processor ratio": mapped.processor_seconds / m.processor_seconds,
            "decoded": m.rows_decoded / n_rows if name != MAPPED else 1.0,
            "peak MB": m.peak_bytes / 1e6,
            "start s": m.start_seconds,
        }
        for name, m in measures.items()
    ]


def write_paper_table(folder: Path) -> None:
    """A table with the rows and row groups of the paper's corpus: one file of 2-token sequences, under many names."""
    tokens = np.zeros((FILE_ROWS, 3), np.int32)
    write_rows(folder / "one", [packed_batch(0, tokens, np.ones((FILE_ROWS, 2), np.uint8))], METADATA)
    (file,) = (folder / "one").glob("*.parquet")
    table = folder / "paper"
    table.mkdir()
    actions = []
    for number in range(PAPER_FILES):
        os.link(file, table / f"part-{number:05}.parquet")
        first = number * FILE_ROWS
        statistics = {"numRecords": FILE_ROWS, "minValues": {"sequence_id": first}, "maxValues": {}, "nullCount": {}}
        size = file.stat().st_size
        actions.append(AddAction(f"part-{number:05}.parquet", size, {}, 0, True, json.dumps(statistics)))
    commit = CommitProperties(custom_metadata={"userMetadata": json.dumps(METADATA)})
    create_table_with_add_actions(table.as_uri(), Schema.from_arrow(SCHEMA), actions, commit_properties=commit)


def paper_size(folder: Path, batch: int, pipe: Connection) -> None:
    """Opens a table with the rows of the paper's corpus and reads some batches; sends one row of the table."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with PeakMemory() as memory:
        started = time.perf_counter()
        sequences = PackedSequences((folder / "paper").as_uri(), None, 2, INFO)
        start_seconds = time.perf_counter() - started
        opened = memory.growth()
        order, steps = RowOrder(sequences.group_rows, 0), range(0, 2000)
        used = time.process_time()
        for step in steps:
            order.batch_rows(step, batch)
        processor_seconds = time.process_time() - used
        # Steps of a new epoch, in which all is computed again.
        last = sequences.n_sequences // batch
        for step in range(last - 5, last + 5):
            order.batch_rows(step, batch)
        started = time.perf_counter()
        sequences.get(order.batch_rows(0, batch))
        first_batch_seconds = time.perf_counter() - started
        # Steps all over the epoch, so that every file is opened and read.
        for step in range(0, last, last // READ_BATCHES):
            sequences.get(order.batch_rows(step, batch))
        row = {
            "sequences": sequences.n_sequences,
            "row groups": len(sequences.group_rows),
            "files": PAPER_FILES,
            "start s": start_seconds,
            "first batch s": first_batch_seconds,
            "MB after start": opened / 1e6,
            "peak MB": memory.growth() / 1e6,
            "order ms/batch": 1e3 * processor_seconds / len(steps),
        }
    pipe.send((row, sequences.group_rows))


def shuffle_quality(group_rows: np.ndarray, batch: int) -> list[dict[str, Any]]:
    """How far neighbours of the table end up, and how many sequences of a batch are of one row group, on average.

    Measured over all neighbours in the row groups of some batches; of a full permutation, computed.
    """
    order, n = RowOrder(group_rows, 0), int(group_rows.sum())
    span = 4 * order.lanes * int(group_rows.max())
    steps = range(span // batch)
    rows = np.concatenate([order.batch_rows(step, batch) for step in steps])
    step_of = np.repeat(np.array(steps), batch)
    by_row = np.argsort(rows)
    ends = np.cumsum(group_rows)
    groups = np.searchsorted(ends, rows[by_row], side="right")
    adjacent = (np.diff(rows[by_row]) == 1) & (np.diff(groups) == 0)
    distance = np.abs(np.diff(step_of[by_row]))[adjacent]
    pairs = np.unique(np.stack([groups, step_of[by_row]]), axis=1, return_counts=True)[1]
    mean_rows = float(np.mean(group_rows))
    return [
        {
            "order": "ours",
            "neighbours apart, mean steps": float(distance.mean()),
            "most": int(distance.max()),
            "in one batch, %": 100 * float((distance == 0).mean()),
            "same row group": float((pairs * (pairs - 1)).sum() / pairs.sum()),
        },
        {
            "order": "full permutation",
            "neighbours apart, mean steps": n / 3 / batch,
            "most": n // batch,
            "in one batch, %": 100 * (batch - 1) / (n - 1),
            "same row group": (batch - 1) * (mean_rows - 1) / (n - 1),
        },
    ]


def at_paper_size(folder: Path, batch: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tables of the paper's size: what it costs, and how well it is shuffled."""
    write_paper_table(folder)
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=paper_size, args=(folder, batch, far_end))
    process.start()
    row, group_rows = pipe.recv()
    process.join()
    return [row], shuffle_quality(group_rows, batch)


def measure(folder: Path, n_rows: int, codecs: Sequence[str], batch: int, from_disk: bool) -> list[dict[str, Any]]:
    """Writes tables and plain files, reads an epoch with each loader, and removes the files."""
    write_tables(folder, n_rows, codecs)
    try:
        steps = n_rows // batch
        return loader_rows(folder, compare(folder, [*codecs, MAPPED], batch, steps, from_disk), steps * batch)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, n_rows: int, batch: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The four tables: names and rows, each as soon as it is measured."""
    yield "from the disk", measure(folder / "disk", n_rows, [CODECS[0]], batch, from_disk=True)
    yield "from the system's cache", measure(folder / "cached", n_rows // 4, CODECS, batch, from_disk=False)
    size, shuffle = at_paper_size(folder, batch)
    yield "paper's size", size
    yield "shuffle", shuffle


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2_500_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "loader")
    options = parser.parse_args(argv)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    ratios: dict[str, float] = {}
    path = None
    try:
        for key, rows in run(options.folder, options.sequences, options.batch):
            print(f"{key}\n{results.table(list(rows[0]), [list(row.values()) for row in rows])}\n", flush=True)
            ratios |= {
                f"{key}: {name}": rows[0][name] for name in ("ratio", "processor ratio", "decoded") if name in rows[0]
            }
            path = results.record("loader", ratios, rows, key)
    finally:
        shutil.rmtree(options.folder)
    print(f"{options.sequences:,} sequences of {LENGTH:,} tokens, batches of {options.batch}; written to {path}")


if __name__ == "__main__":
    main()
