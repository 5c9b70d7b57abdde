"""How much a model gains from the beginning of a text, kept in the record of the model. Driver only; no Spark.

The gain is the loss of the first halves of a sample of texts minus the loss of their second halves, in nats per byte. A
model that copies from its context has a large gain on repeated text. `scores/halves.py` measures it, and refinement
reads it. Owns the key of the record; a record without the key, or of another revision, has no gain.
"""

from collections.abc import Iterable

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import DamagedRecordError

KEY = "context_gain"


def read(config: ExperimentConfig, aliases: Iterable[str]) -> dict[str, float]:
    """Returns the gains that were measured, by alias, in nats per byte.

    Args:
        config: the experiment.
        aliases: aliases of scored models; a model without a gain is left out.
    """
    gains = {}
    for alias in aliases:
        try:
            record = storage.read_json(config.layout.model_record(alias))
        except DamagedRecordError:
            continue
        gain = record.get(KEY) if isinstance(record, dict) else None
        if isinstance(gain, float):
            gains[alias] = gain
    return gains


def keep(config: ExperimentConfig, alias: str, revision: str, gain: float) -> None:
    """Writes the gain of a model into its record; without a record of this revision, it writes nothing.

    Args:
        config: the experiment.
        alias: the model's alias.
        revision: the model's revision.
        gain: nats per byte.
    """
    uri = config.layout.model_record(alias)
    record = storage.read_json(uri)
    if isinstance(record, dict) and record.get("model_revision") == revision:
        storage.write_json(uri, record | {KEY: gain})
