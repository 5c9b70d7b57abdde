"""The trainer's loader next to a memory-mapped file of the same tokens, and what a table of the paper's size costs.

    python -m tests.bench.bench_loader [--gigabytes 5] [--batch 512] [--compression UNCOMPRESSED]

Writes a packed table of random tokens with the frequencies of text (Zipf, 151,936 ids, sequences of 1,024), and the same
tokens and masks as plain files, below `--folder`, and removes both. One epoch of each loader is read, as int64 ids and
uint8 masks, in processes that stay on one core; the loaders take turns, so that other work on the machine slows both.
The memory-mapped file is read in a full permutation of its rows; all files are in the system's cache. Then opens a table
with the rows and row groups of the paper's 48.8 million sequences, of 2 tokens each, and computes batches of its order.
Prints three tables and writes `build/bench/loader.json`.

    tokens/s      input tokens of the batches over processor seconds of all threads
    decoded       bytes decoded over bytes trained on; the limit is 1, each byte once
    peak          highest resident memory during the epoch, without what the process had before it opened the table
    same group    other sequences of a batch that come from a sequence's own row group
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from deltalake import Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.packing.file_layout import FILE_ROWS
from tests.bench import results
from tests.support.packed_tables import SCHEMA, packed_batch, write_rows
from trainer.batches import Batches
from trainer.data import PackedSequences, TokenizerInfo
from trainer.distributed import World
from trainer.order import RowOrder

LENGTH, VOCABULARY = 1024, 151_936
ROW_BYTES = 4 * (LENGTH + 1) + LENGTH
PAPER_FILES = 745  # of FILE_ROWS rows: 48.8 million sequences
BLOCK_STEPS = 50
OURS, MAPPED = "ours", "memory-mapped file"
GetBatch = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
INFO = TokenizerInfo(document_separator="x", document_separator_id=0, tokenizer_hash="h", vocab_size=VOCABULARY)


def random_rows(n_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of token ids (n, L + 1) and masks (n, L); one sequence in eight has a position without a target."""
    generator = np.random.default_rng(0)
    frequencies = np.cumsum(1 / np.arange(1, VOCABULARY + 1) ** 1.07)
    ids = generator.permutation(VOCABULARY).astype("<i4")
    pool = ids[np.searchsorted(frequencies, generator.random(1 << 24) * frequencies[-1])]
    for start in range(0, n_rows, 8192):
        n = min(8192, n_rows - start)
        begins = generator.integers(0, len(pool) - LENGTH - 1, n)
        mask = np.ones((n, LENGTH), np.uint8)
        mask[::8, generator.integers(0, LENGTH)] = 0
        yield np.stack([pool[begin : begin + LENGTH + 1] for begin in begins]), mask


def write_both(folder: Path, n_rows: int, compression: str) -> None:
    """Writes the packed table and the two plain files."""

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file:
            for tokens, mask in random_rows(n_rows):
                tokens_file.write(tokens.data)
                mask_file.write(mask.data)
                yield packed_batch(first, tokens, mask)
                first += len(tokens)

    write_rows(folder / "table", batches(), {}, compression=compression, bytes_per_row=ROW_BYTES)


class MappedFile:
    """The plain files in memory, read in a permutation of all rows."""

    def __init__(self, folder: Path, batch: int):
        self.tokens = np.memmap(folder / "tokens.bin", "<i4", "r").reshape(-1, LENGTH + 1)
        self.mask = np.memmap(folder / "mask.bin", "u1", "r").reshape(-1, LENGTH)
        self.rows = np.random.default_rng(0).permutation(len(self.tokens))
        self.batch = batch

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and mask of a step."""
        rows = self.rows[step * self.batch : (step + 1) * self.batch]
        return torch.from_numpy(self.tokens[rows]).to(torch.int64), torch.from_numpy(self.mask[rows])


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


@dataclasses.dataclass(frozen=True)
class Measures:
    """What one loader used for an epoch: seconds, bytes, and rows decoded over rows read."""

    start_seconds: float
    processor_seconds: float
    peak_bytes: int
    decoded: float


@contextlib.contextmanager
def open_loader(name: str, folder: Path, batch: int, steps: int) -> Iterator[tuple[GetBatch, Callable[[], float]]]:
    """A loader's function from a step to its batch, and a function that returns rows decoded over rows read."""
    if name == MAPPED:
        yield MappedFile(folder, batch).get, lambda: 1.0
        return
    sequences = PackedSequences((folder / "table").as_uri(), None, LENGTH, INFO)
    batches = Batches(sequences, TrainConfig(batch_sequences=batch, steps=steps, warmup_steps=0), World())
    with batches.read_ahead(0, steps):
        yield batches.get, lambda: sequences.cache.rows_decoded / (steps * batch)


def serve(name: str, folder: Path, batch: int, steps: int, pipe: Connection) -> None:
    """A process with one loader on one core: reads the steps that it is asked for, then sends its measures."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        started = time.perf_counter()
        with open_loader(name, folder, batch, steps) as (get, decoded):
            start_seconds, used = time.perf_counter() - started, time.process_time()
            pipe.send("ready")
            while (block := pipe.recv()) is not None:
                for step in block:
                    get(step)
                pipe.send("done")
            pipe.send(Measures(start_seconds, time.process_time() - used, memory.growth(), decoded()))


def compare(folder: Path, batch: int, steps: int) -> dict[str, Measures]:
    """Reads the same steps with each loader, in turns."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name in (OURS, MAPPED):
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, folder, batch, steps, far_end)))
        processes[-1].start()
        pipes[name].recv()
    for first in range(0, steps, BLOCK_STEPS):
        for pipe in pipes.values():
            pipe.send(range(first, min(steps, first + BLOCK_STEPS)))
            pipe.recv()
    for pipe in pipes.values():
        pipe.send(None)
    measures = {name: pipe.recv() for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return measures


def loader_rows(measures: dict[str, Measures], n_tokens: int, table_bytes: int) -> list[dict[str, Any]]:
    """The table of the loaders."""
    return [
        {
            "loader": name,
            "M tokens/s": n_tokens / m.processor_seconds / 1e6,
            "ratio": measures[MAPPED].processor_seconds / m.processor_seconds,
            "decoded": m.decoded,
            "peak MB": m.peak_bytes / 1e6,
            "table/peak": table_bytes / m.peak_bytes,
            "start s": m.start_seconds,
        }
        for name, m in measures.items()
    ]


def write_paper_table(folder: Path) -> None:
    """A table with the rows and row groups of the paper's corpus: one file of 2-token sequences, under many names."""
    tokens = np.zeros((FILE_ROWS, 3), np.int32)
    write_rows(folder / "one", [packed_batch(0, tokens, np.ones((FILE_ROWS, 2), np.uint8))], {})
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
    create_table_with_add_actions(table.as_uri(), Schema.from_arrow(SCHEMA), actions)


def paper_size(folder: Path, batch: int, pipe: Connection) -> None:
    """Opens a table with the rows of the paper's corpus and computes some batches; sends one row of the table."""
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
        row = {
            "sequences": sequences.n_sequences,
            "row groups": len(sequences.group_rows),
            "files": PAPER_FILES,
            "start s": start_seconds,
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
            "order": OURS,
            "neighbours apart, mean steps": float(distance.mean()),
            "most": int(distance.max()),
            "in one batch": float((distance == 0).mean()),
            "same group": float((pairs * (pairs - 1)).sum() / pairs.sum()),
        },
        {
            "order": "full permutation",
            "neighbours apart, mean steps": n / 3 / batch,
            "most": n // batch,
            "in one batch": (batch - 1) / (n - 1),
            "same group": (batch - 1) * (mean_rows - 1) / (n - 1),
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


def run(folder: Path, gigabytes: float, batch: int, compression: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of the three tables by their names."""
    n_rows = int(gigabytes * 1e9 / ROW_BYTES)
    write_both(folder, n_rows, compression)
    table_bytes = sum(path.stat().st_size for path in (folder / "table").glob("*.parquet"))
    steps = n_rows // batch
    loaders = loader_rows(compare(folder, batch, steps), steps * batch * LENGTH, table_bytes)
    size, shuffle = at_paper_size(folder, batch)
    table = [{"sequences": n_rows, "table GB": table_bytes / 1e9, "bytes/token": table_bytes / n_rows / LENGTH}]
    return {"table": table, "loaders": loaders, "paper_size": size, "shuffle": shuffle}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--compression", default="UNCOMPRESSED", help="UNCOMPRESSED, LZ4_RAW, ZSTD or SNAPPY")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "loader")
    options = parser.parse_args(argv)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        tables = run(options.folder, options.gigabytes, options.batch, options.compression)
    finally:
        shutil.rmtree(options.folder)
    for rows in tables.values():
        print(results.table(list(rows[0]), [list(row.values()) for row in rows]), end="\n\n")
    ours = tables["loaders"][0]
    ratios = {"loader_vs_mapped_file": ours["ratio"], "bytes_decoded_vs_trained_on": ours["decoded"]}
    path = None
    for key, rows in tables.items():
        path = results.record("loader", ratios, rows, key)
    print(f"batches of {options.batch}, {options.compression}, one core; written to {path}")


if __name__ == "__main__":
    main()
