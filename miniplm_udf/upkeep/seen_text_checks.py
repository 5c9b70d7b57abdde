"""Checks that no model scores the text that it was trained on. Driver only, no Spark.

Input: a config. Output: problems and warnings, each a sentence with its key and its remedy. A model that this project
trained says in its `training.json` where its text came from. A text's split follows from its hash alone, and the split
`reference` begins with the highest hashes: with a share that is not smaller, the texts that a reference was trained on
are in the split `reference` again, and are not scored. Reads the records of the models' folders; writes nothing.
"""

from collections.abc import Iterator
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import MiniplmError
from miniplm_udf.store.model_records import TrainingRecord, read_training_in

_REFERENCE = "reference"


def seen_text_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields models that would score the text that they were trained on, because they come from the same input.

    Args:
        config: the experiment.
    """
    for alias, record in _suspects(config):
        here = {storage.redact(storage.to_uri(path)) for path in config.ingest.inputs}
        if record.text is not None and here & set(record.text.inputs):
            yield f"{_start(config, alias, record)}, and this experiment has the same input: {_remedy(alias, record)}"


def seen_text_warnings(config: ExperimentConfig) -> Iterator[str]:
    """Yields models that may score the text that they were trained on.

    Args:
        config: the experiment, in which `seen_text_problems` finds nothing.
    """
    for alias, record in _suspects(config):
        yield f"{_start(config, alias, record)}. If this input has the same texts, {_remedy(alias, record)}"


def _suspects(config: ExperimentConfig) -> Iterator[tuple[str, TrainingRecord]]:
    """The models with a path that this project trained on texts which this experiment may score."""
    for alias in config.scored_aliases:
        path = config.models[alias].path
        record = _record(path) if path is not None else None
        if record is not None and not _is_left_out(config, record):
            yield alias, record


def _record(path: str) -> TrainingRecord | None:
    try:
        folder = Path(path).expanduser()
        return read_training_in(str(folder)) if folder.is_dir() else None
    except (MiniplmError, OSError, ValueError):
        return None  # other checks report a folder that cannot be read


def _is_left_out(config: ExperimentConfig, record: TrainingRecord) -> bool:
    """Whether the texts of a reference are certainly in the split `reference` of this experiment."""
    share = config.ingest.split.reference
    return _corpus(record) == _REFERENCE and record.text is not None and share >= record.text.reference_share


def _corpus(record: TrainingRecord) -> str | None:
    return (record.lineage or {}).get("corpus")


def _start(config: ExperimentConfig, alias: str, record: TrainingRecord) -> str:
    corpus = _corpus(record)
    what = "the split reference" if corpus == _REFERENCE else f"the corpus {corpus}"
    inputs = f" of {', '.join(map(storage.shown, record.text.inputs))}" if record.text is not None else ""
    return f"models.{alias}.path: {config.models[alias].path} was trained on {what}{inputs}"


def _remedy(alias: str, record: TrainingRecord) -> str:
    wrong = f"the losses of {alias} on these texts are too low to be compared with those on other texts"
    if _corpus(record) != _REFERENCE:
        return f"{wrong}; name a model that was trained on other text"
    share = f"{record.text.reference_share:g}" if record.text is not None else "the share of that experiment"
    return (
        f"{wrong}; set ingest.split.reference={share}, which leaves these texts out, or name a model that was trained "
        "on other text"
    )
