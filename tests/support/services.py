"""`miniplm stream` over a folder, in this process, with fake scorers."""

import dataclasses
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import stream
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, SplitConfig, StreamConfig
from miniplm_udf.store import tables
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.status import QueryStatus
from tests.support.score_tables import FakeFactory, experiment, two_models


class Service:
    """`miniplm stream` over a folder of JSONL files, with fake scorers; in the main thread, as for users."""

    def __init__(self, spark: Any, tmp_path: Path, **settings: Any) -> None:
        self.spark, self.inbox, self.log = spark, tmp_path / "inbox", tmp_path / "calls.log"
        self.inbox.mkdir()
        base = experiment(tmp_path / "root", two_models(tmp_path))
        chunking = ChunkingConfig(mode="document", max_tokens=1025)
        self.config = dataclasses.replace(
            base,
            ingest=IngestConfig(
                input=f"{self.inbox}/*.jsonl*", chunking=chunking, split=SplitConfig(reference=0, heldout=0),
                state_partitions=1,
            ),
            stream=StreamConfig(interval_seconds=0.5, **settings),
        )  # fmt: skip
        self.failure: BaseException | None = None

    def deliver(self, name: str, documents: Sequence[str]) -> None:
        hidden = self.inbox / f".{name}"
        hidden.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in documents))
        hidden.rename(self.inbox / f"{name}.jsonl")

    def deliver_cut(self, name: str) -> None:
        """A packed file without its second half."""
        packed = gzip.compress(os.urandom(1000))
        (self.inbox / f".{name}").write_bytes(packed[: len(packed) // 2])
        (self.inbox / f".{name}").rename(self.inbox / f"{name}.jsonl.gz")

    def factories(self) -> dict[str, FakeFactory]:
        return {"teacher": FakeFactory(1.0, str(self.log)), "reference": FakeFactory(2.0, str(self.log))}

    def count(self, name: str) -> int:
        uri = self.config.layout.table(name)
        return self.spark.read.format("delta").load(uri).count() if tables.exists(self.spark, uri) else 0

    def run(self, meanwhile: Callable[[], None], run: Callable[..., Any] = stream.run) -> Any:
        """Runs the service and, in a thread, `meanwhile`; then sends SIGTERM."""

        def beside() -> None:
            try:
                meanwhile()
            except BaseException as error:
                self.failure = error
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        # Should `meanwhile` end before the service takes signals, the signal would end the tests.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        thread = threading.Thread(target=beside)
        thread.start()
        try:
            return run(self.spark, self.config, self.factories())
        finally:
            thread.join()
            signal.signal(signal.SIGTERM, before)
            self.spark.sparkContext.setLogLevel("ERROR")
            if self.failure is not None:
                raise self.failure

    def status(self, query: str) -> QueryStatus:
        return next(found for found in statuses.read_all(self.config.root) if found.query == query)


def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.3)
