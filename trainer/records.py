"""The result of a training, and the name of the record that a registration leaves in a model folder.

`training.json`, the record of a trained model, is declared in `miniplm_udf.store.model_records`. Needs neither
torch nor Spark.
"""

import dataclasses

from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import TrainingRecord

REGISTRATION_FILE = "registration.json"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `train` for one model.

    Attributes:
        name: the model.
        record: its `training.json`. None for a frozen model folder without this file, for a training that was stopped,
            and on ranks other than 0.
        skipped: whether the model was trained before.
        stopped_after: the saved step after which a signal stopped the training; None if it is finished.
    """

    name: str
    record: TrainingRecord | None
    skipped: bool
    stopped_after: int | None = None

    def __str__(self) -> str:
        """One line for people: steps, tokens, rate and last loss."""
        if self.stopped_after is not None:
            return f"{self.name}: stopped after step {self.stopped_after:,}, which is saved"
        record = self.record
        if record is None:
            return f"{self.name}: there is a model, but no record of its training"
        parts = [f"{record.steps:,} steps of {record.tokens:,} tokens in {record.seconds:,.0f} s"]
        if record.seconds > 0:
            parts.append(f"{record.tokens / record.seconds:,.0f} tokens/s")
        if record.final_loss is not None:
            parts.append(f"loss of the last step {record.final_loss:.4f} nats/token")
        return f"{self.name}: {', '.join(parts)}{' (trained before)' if self.skipped else ''}"

    def as_json(self) -> Json:
        """The record's keys, and `skipped`; for a training that was stopped also `stopped_after`."""
        keys = {"name": self.name} if self.record is None else dataclasses.asdict(self.record)
        stop = {} if self.stopped_after is None else {"stopped_after": self.stopped_after}
        return {**keys, **stop, "skipped": self.skipped}
