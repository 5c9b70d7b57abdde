"""The records that stages leave under `<root>/_stages/`: one JSON file a stage. Driver only, no Spark.

A record holds the fingerprint of the stage's config and inputs, its summary, its seconds and when it finished. It is
written after the stage has committed: a killed stage has no record of that work, and runs again. Whether a stage may be
skipped is decided in `stage.py`.
"""

import dataclasses
import datetime
import json
import time
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import DamagedRecordError
from miniplm_udf.json_records import from_json
from miniplm_udf.layout import Root
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecord:
    """The record of a stage that has finished.

    Attributes:
        fingerprint: of the stage's config and inputs, taken before it ran.
        summary: what the stage returned: a dataclass, in the file its JSON.
        seconds: how long it ran.
        finished_at: seconds since 1970; None in a record of an earlier release.
    """

    fingerprint: str
    summary: Any
    seconds: float
    finished_at: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedStage:
    """When a stage of a root last finished.

    Attributes:
        stage: its name.
        finished_at: UTC, as text; None in a record of an earlier release.
        seconds: how long it ran.
    """

    stage: str
    finished_at: str | None
    seconds: float


def finished_stages(root: Root) -> list[FinishedStage]:
    """Returns the stages of a root that have finished, in the order in which they did.

    Args:
        root: its records are read.

    Raises:
        DamagedRecordError: a file is not a record.
    """
    files = storage.list_folder(root.stage())
    records = {name: _read(root, name) for file in files if (name := file.removesuffix(".json")) != file}
    finished = sorted((record.finished_at or 0.0, name, record.seconds) for name, record in records.items() if record)
    return [
        FinishedStage(stage=name, finished_at=utc(at) if at else None, seconds=seconds)
        for at, name, seconds in finished
    ]


def utc(seconds: float) -> str:
    """Returns a time to the minute.

    Args:
        seconds: since 1970.
    """
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M}"


def read_record(config: ExperimentConfig, stage: str, summary_class: Any) -> StageRecord | None:
    """Reads the record of a stage.

    Args:
        config: its root is read.
        stage: name of the stage.
        summary_class: the dataclass of the summary.

    Returns:
        The record; None if the stage never finished, or if its summary lacks a key of `summary_class`: it is of an
        earlier release then, and the stage runs again.

    Raises:
        DamagedRecordError: the file is not a record.
    """
    record = _read(config.layout, stage)
    summary = None if record is None else from_json(summary_class, record.summary)
    return None if record is None or summary is None else dataclasses.replace(record, summary=summary)


def _read(root: Root, stage: str) -> StageRecord | None:
    """The record with its summary as JSON; None if there is none."""
    raw = storage.read_json(root.stage(stage))
    if raw is None:
        return None
    record = from_json(StageRecord, raw)
    if record is None:
        raise DamagedRecordError(
            f"record {storage.redact(root.stage(stage))}: expected ['fingerprint', 'seconds', 'summary'], "
            "found something else; remove it, and the stage runs again"
        )
    return record


def write_record(config: ExperimentConfig, stage: str, fingerprint: str, summary: Json, seconds: float) -> None:
    """Writes the record of a stage that has just finished.

    Args:
        config: its root is written.
        stage: name of the stage.
        fingerprint: of its config and inputs, taken before it ran.
        summary: what it returned, as JSON.
        seconds: how long it ran.
    """
    record = StageRecord(fingerprint=fingerprint, summary=summary, seconds=round(seconds, 3), finished_at=time.time())
    storage.write_json(config.layout.stage(stage), json.loads(json.dumps(dataclasses.asdict(record), default=str)))
