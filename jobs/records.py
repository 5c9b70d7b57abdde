"""The records that stages leave under `<root>/_stages/`: one JSON file a stage. Driver only, no Spark.

A record holds the fingerprint of the stage's config and inputs, its summary, its seconds and when it finished. It is
written after the stage has committed, so a stage that was killed leaves none for that work and runs again. Whether a
stage may be skipped is decided in `stages.py`.
"""

import json
import time
from typing import Any, NotRequired, TypedDict

from jobs.text import plain
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import DamagedRecordError
from miniplm_udf.storage import Json

_KEYS = {"fingerprint", "summary", "seconds"}


class StageRecord(TypedDict):
    """The record of a stage that has finished.

    Attributes:
        fingerprint: of the stage's config and inputs, taken before it ran.
        summary: what the stage returned, perhaps in an earlier release, as plain data.
        seconds: how long it ran.
        finished_at: seconds since 1970; absent in a record of an earlier release.
    """

    fingerprint: str
    summary: Json
    seconds: float
    finished_at: NotRequired[float]


def read_record(config: ExperimentConfig, stage: str) -> StageRecord | None:
    """Reads the record of a stage.

    Args:
        config: its root is read.
        stage: name of the stage.

    Returns:
        The record; None if the stage never finished.

    Raises:
        DamagedRecordError: the file is not a record.
    """
    record: StageRecord | None = storage.read_json(config.layout.stage(stage))
    if record is not None and not (isinstance(record, dict) and record.keys() >= _KEYS):
        raise DamagedRecordError(
            f"record {storage.redact(config.layout.stage(stage))}: expected {sorted(_KEYS)}, found something else; "
            "remove it, and the stage runs again"
        )
    return record


def write_record(config: ExperimentConfig, stage: str, fingerprint: str, summary: Any, seconds: float) -> None:
    """Writes the record of a stage that has just finished.

    Args:
        config: its root is written.
        stage: name of the stage.
        fingerprint: of its config and inputs, taken before it ran.
        summary: what it returned, a dataclass or plain data.
        seconds: how long it ran.
    """
    record: StageRecord = {
        "fingerprint": fingerprint,
        "summary": plain(summary),
        "seconds": round(seconds, 3),
        "finished_at": time.time(),
    }
    storage.write_json(config.layout.stage(stage), json.loads(json.dumps(record, default=str)))


def summary_of(config: ExperimentConfig, stage: str) -> Json:
    """Reads the summary in the record of a stage.

    Args:
        config: its root is read.
        stage: name of the stage.

    Returns:
        The summary; empty if the stage never finished.

    Raises:
        DamagedRecordError: the file is not a record.
    """
    record = read_record(config, stage)
    return (record["summary"] if record else None) or {}
