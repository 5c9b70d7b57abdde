"""The scored models on the driver: descriptions that an executor makes, kept as `<root>/models/<alias>.json`.

Input: the experiment's config. Output: a `ModelDescription` for each alias. A model's dtype is settled at its first
scoring and read from its record later, or from `scores` if the record is gone, whatever hardware resumes. A record also
keeps the token budgets of forward passes that executors found, by kind of GPU. Driver only; an executor reads the model
files with torch and transformers. A rerun describes the models again and replaces the records; the budgets, and the
gain that halves.py measured, stay while the model's revision does.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import CorpusError, DamagedRecordError, ModelLoadError
from miniplm_udf.layout import Root
from miniplm_udf.scoring.description import ModelDescription, settled_dtype, with_absolute_path
from miniplm_udf.storage import Json
from miniplm_udf.store import context_gains, tables
from miniplm_udf.workers.remote import model_errors, run_on_executor

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.score")

# Key of a record: token budgets by kind of device and dtype.
_BUDGETS = "tokens_per_batch"


def read_record(config: ExperimentConfig, alias: str) -> ModelDescription:
    """Returns the record of a model that has scored or generated.

    Args:
        config: the experiment.
        alias: the model's alias.

    Raises:
        CorpusError: there is no record.
    """
    record = storage.read_json(config.layout.model_record(alias))
    if record is None:
        raise CorpusError(
            f"{storage.redact(config.layout.model_record(alias))}: expected the record of model {alias}, found none; "
            "run `miniplm score` first, or `miniplm generate` if the model is to generate"
        )
    return ModelDescription.from_dict(record)


def model_configs(config: ExperimentConfig) -> dict[str, ModelConfig]:
    """Finds the models to score with.

    Args:
        config: the experiment.

    Returns:
        By alias, the model with a path that an executor understands. A model that this experiment trains gets the path
        of its folder.

    Raises:
        ModelLoadError: a model that this experiment trains does not exist yet.
    """
    models = {}
    for alias in config.scored_aliases:
        model = config.models[alias]
        if model.path is None:
            folder = config.layout.model(alias)
            if not storage.exists(storage.join(folder, "config.json")):
                raise ModelLoadError(
                    f"models.{alias}: expected the model that this experiment trains in {storage.redact(folder)}, "
                    "found none; run `miniplm reference` first"
                )
            model = dataclasses.replace(model, path=folder)
        models[alias] = with_absolute_path(model)
    return models


def describe_models(
    spark: "SparkSession", config: ExperimentConfig, models: dict[str, ModelConfig]
) -> dict[str, ModelDescription]:
    """Describes the models on an executor and writes their records.

    Args:
        spark: a session.
        config: the experiment, whose root holds the records.
        models: the models by alias (`model_configs`).

    Returns:
        Descriptions by alias, in the order of `models`.

    Raises:
        MiniplmError: the executor's error, of the same class and with the same message.
    """
    dtypes = {alias: _settled_dtype(spark, config, alias) for alias in models}
    descriptions = describe_on_executor(spark, models, dtypes)
    for alias, description in descriptions.items():
        earlier, budgets = _record_and_budgets(config.layout, description)
        gain = {context_gains.KEY: earlier[context_gains.KEY]} if context_gains.KEY in earlier else {}
        record = description.to_dict() | ({_BUDGETS: budgets} if budgets else {}) | gain
        storage.write_json(config.layout.model_record(alias), record)
        LOGGER.info("%s: prefix: %s", alias, description.prefix)
        for warning in description.warnings:
            LOGGER.warning("%s", warning)
    return descriptions


def kept_tokens_per_batch(layout: Root, description: ModelDescription) -> dict[str, int]:
    """Returns the token budgets that the record of a model keeps.

    Args:
        layout: the root that holds the record.
        description: the model as it is now.

    Returns:
        Tokens of a forward pass by kind of device and dtype; empty if there is no record, if it cannot be read, or if
        it describes another revision of the model.
    """
    return _record_and_budgets(layout, description)[1]


def _record_and_budgets(layout: Root, description: ModelDescription) -> tuple[Json, dict[str, int]]:
    """The record of a model and its budgets; empty if no record can be read, or if it has another revision."""
    try:
        record = storage.read_json(layout.model_record(description.model_id))
    except DamagedRecordError:
        return {}, {}
    if not isinstance(record, dict) or record.get("model_revision") != description.model_revision:
        return {}, {}
    budgets = record.get(_BUDGETS)
    pairs = budgets.items() if isinstance(budgets, dict) else ()
    return record, {place: tokens for place, tokens in pairs if type(tokens) is int and tokens >= 1}


def keep_tokens_per_batch(layout: Root, description: ModelDescription, budgets: Mapping[str, int]) -> None:
    """Writes token budgets into the record of a model, if they are new. Budgets of other kinds of devices stay.

    Args:
        layout: the root that holds the record.
        description: the model as it scores; nothing is written without a record of its revision.
        budgets: tokens of a forward pass by kind of device and dtype.
    """
    record, kept = _record_and_budgets(layout, description)
    updated = {**kept, **budgets}
    if record and updated != kept:
        storage.write_json(layout.model_record(description.model_id), record | {_BUDGETS: updated})


def describe_on_executor(
    spark: "SparkSession", models: Mapping[str, ModelConfig], dtypes: Mapping[str, str | None]
) -> dict[str, ModelDescription]:
    """Describes models on an executor, where they will run; writes nothing.

    Args:
        spark: a session.
        models: the models by alias, with paths that an executor understands.
        dtypes: dtype that was settled at each model's first scoring, by alias; None settles it for the executor.

    Returns:
        Descriptions by alias, in the order of `models`.

    Raises:
        MiniplmError: the executor's error, of the same class and with the same message.
    """
    return run_on_executor(
        spark, lambda: {alias: describe_here(alias, model, dtypes[alias]) for alias, model in models.items()}
    )


def describe_here(alias: str, model: ModelConfig, dtype: str | None) -> ModelDescription:
    """Returns the description of a model, made on this machine (an executor); loads torch and transformers.

    Args:
        alias: the model's alias.
        model: its config.
        dtype: the dtype that was settled at its first scoring; None settles it for this machine.

    Raises:
        ConfigError: a setting of the model is wrong (see `scoring.models.describe`).
        ModelLoadError: the model cannot be found or read.
    """
    with model_errors(alias):
        from miniplm_udf.scoring.models import describe

        return describe(alias, model, dtype)


def _settled_dtype(spark: "SparkSession", config: ExperimentConfig, alias: str) -> str | None:
    """The dtype of the model's record or, if that is gone, of its newest scores; None if the config sets one."""
    from pyspark.sql import functions as F

    if config.models[alias].dtype != "auto":
        return None
    if settled := settled_dtype(storage.read_json(config.layout.model_record(alias))):
        return settled
    if not tables.exists(spark, config.layout.table("scores")):
        return None
    is_local = (F.col("model_id") == alias) & (F.col("dtype") != "server")
    scores = tables.read(spark, config.layout.table("scores")).where(is_local)
    dtype: str | None = scores.agg(F.max_by("dtype", "scored_at")).collect()[0][0]
    return dtype
