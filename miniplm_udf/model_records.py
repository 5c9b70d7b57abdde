"""The scored models as the driver knows them: descriptions made on an executor, kept as `<root>/models/<alias>.json`.

Input: the experiment's config. Output: a `ModelDescription` by alias. A model's dtype is settled at its first scoring
and read from its record ever after, whatever hardware resumes. Driver only; model files, torch and transformers are
looked at by an executor. A rerun describes the models again and replaces the records.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig, ModelConfig
from miniplm_udf.errors import CorpusError, ModelLoadError
from miniplm_udf.scoring.description import ModelDescription, with_absolute_path
from miniplm_udf.udf import DESCRIBE_REQUEST_DDL, DESCRIBED_DDL, describe_arrow, description_of, model_config_json

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.score")


def record_uri(config: ExperimentConfig, alias: str) -> str:
    return config.model_uri(f"{alias}.json")


def read_record(config: ExperimentConfig, alias: str) -> ModelDescription:
    """The record of a model that has been scored with.

    Raises:
        CorpusError: there is none.
    """
    plain = storage.read_json(record_uri(config, alias))
    if plain is None:
        raise CorpusError(
            f"{storage.redact(record_uri(config, alias))}: expected the record of model {alias}, found none; "
            "run `miniplm score` first"
        )
    return ModelDescription.from_dict(plain)


def model_configs(config: ExperimentConfig) -> dict[str, ModelConfig]:
    """The models to score with, each with a path that an executor understands.

    Raises:
        ModelLoadError: a model that this experiment trains is not there yet.
    """
    found = {}
    for alias in config.scored_aliases:
        model = config.models[alias]
        if model.path is None:
            folder = config.model_uri(alias)
            if not storage.exists(storage.join(folder, "config.json")):
                raise ModelLoadError(
                    f"models.{alias}: expected the model that this experiment trains in {storage.redact(folder)}, "
                    "found none; run `miniplm reference` first"
                )
            model = dataclasses.replace(model, path=folder)
        found[alias] = with_absolute_path(model)
    return found


def describe_models(
    spark: "SparkSession", config: ExperimentConfig, models: dict[str, ModelConfig]
) -> dict[str, ModelDescription]:
    """Describes the models on an executor and writes their records.

    Raises:
        MiniplmError: of the class and with the message that the executor met.
    """
    rows = [(alias, model_config_json(model), _settled_dtype(config, alias)) for alias, model in models.items()]
    requests = spark.createDataFrame(rows, DESCRIBE_REQUEST_DDL).repartition(1)
    found = {
        row["alias"]: description_of(row.asDict())
        for row in requests.mapInArrow(describe_arrow, DESCRIBED_DDL).collect()
    }
    for alias in models:
        storage.write_json(record_uri(config, alias), found[alias].to_dict())
        for warning in found[alias].warnings:
            LOGGER.warning("%s", warning)
    return {alias: found[alias] for alias in models}


def _settled_dtype(config: ExperimentConfig, alias: str) -> str | None:
    """The dtype of the record, for a config that leaves it open."""
    record = storage.read_json(record_uri(config, alias)) if config.models[alias].dtype == "auto" else None
    return str(record["dtype"]) if record else None
