"""Registers finished students as models in MLflow, loadable by `mlflow.transformers.load_model`.

Reads the folder `<root>/models/<name>/` of each student. Logs it as a model of the training's run: weights, tokenizer,
signature, an input example, and metadata that names the packed table and its version; then registers it as a version
of `mlflow.registered_model`. Records both steps in `registration.json` of the folder, so the weights of a training are
sent once. No other file of the folder changes. If MLflow cannot be reached, the next `miniplm train` registers the
model. Loads the weights into memory, on the CPU. Rank 0 only; a lease makes sure that one process registers a model.
"""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError, first_line
from miniplm_udf.json_records import from_json
from miniplm_udf.lease import Lease
from miniplm_udf.store.model_records import TrainingRecord, read_training
from trainer.records import REGISTRATION_FILE
from trainer.results.model_folder import no_progress_bars
from trainer.tracking.store import connect, existing_run, is_artifact_error, wait_for_uploads

LOGGER = logging.getLogger("miniplm.trainer.registry")

_PACKAGES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "accelerate")
_EXAMPLE = "The"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """`registration.json`: the model in MLflow that has a student's weights.

    Attributes:
        tracking_id: id of the training that made the weights.
        model_id: id of the logged model in MLflow.
        tracking_uri: the MLflow store that has the model, without user and query.
        registered_model: name of the registered model; None until the version is registered.
        version: its version; None until the version is registered.
    """

    tracking_id: str | None
    model_id: str
    tracking_uri: str | None = None
    registered_model: str | None = None
    version: str | None = None


def register(config: ExperimentConfig, names: Sequence[str]) -> dict[str, Registration]:
    """Registers the finished students that are not registered yet; does nothing without `mlflow.registered_model`.

    Args:
        config: the experiment.
        names: names of students; students that are not trained are left out.

    Returns:
        The registrations by student. A registration that failed is missing or has no version; a warning says why.
    """
    registrations: dict[str, Registration] = {}
    if config.mlflow.registered_model is None:
        return registrations
    for name in names:
        try:
            with Lease(config.layout.lease(f"train-{name}"), name, what="training"):
                training = read_training(config, name)
                if training is not None:
                    registrations[name] = _register(config, training, config.mlflow.registered_model)
        except CorpusError as error:  # another process has the lease
            LOGGER.warning("%s", error)
        except Exception as error:
            if not is_artifact_error(error):
                raise
            reason = storage.redact(first_line(error))
            LOGGER.warning(
                "%s: MLflow does not register the model: %s; the next `miniplm train` tries again", name, reason
            )
    return registrations


def _register(config: ExperimentConfig, training: TrainingRecord, pattern: str) -> Registration:
    """Sends the model and registers it; each step is recorded."""
    uri = config.layout.model(training.name, REGISTRATION_FILE)
    wanted = pattern.replace("{student}", training.name)
    registration = from_json(Registration, storage.read_json(uri))
    store = storage.redact(config.mlflow_uri())
    if registration is None or (registration.tracking_id, registration.tracking_uri) != (training.tracking_id, store):
        registration = None
    if registration is not None and registration.registered_model == wanted:
        return registration
    mlflow = connect(config)
    wait_for_uploads()
    if registration is None or not _has_model(mlflow, registration.model_id):
        LOGGER.info("%s: sending the model to MLflow", training.name)
        with no_progress_bars():
            model_id = _log_model(mlflow, config, training)
        registration = Registration(tracking_id=training.tracking_id, model_id=model_id, tracking_uri=store)
        storage.write_json(uri, dataclasses.asdict(registration))
    version = mlflow.register_model(f"models:/{registration.model_id}", wanted, tags=_facts(training)).version
    registration = dataclasses.replace(registration, registered_model=wanted, version=str(version))
    storage.write_json(uri, dataclasses.asdict(registration))
    LOGGER.info("%s: registered in MLflow as version %s of %s", training.name, version, wanted)
    return registration


def _has_model(mlflow: Any, model_id: str) -> bool:
    """Whether the logged model still exists in this store."""
    try:
        return bool(mlflow.get_logged_model(model_id).status == "READY")
    except mlflow.exceptions.MlflowException as error:
        if error.get_http_status_code() == 404:
            return False
        raise


def _log_model(mlflow: Any, config: ExperimentConfig, training: TrainingRecord) -> str:
    """Logs the model folder as a model of the training's run; returns its id."""
    from mlflow import transformers as flavor
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    folder = storage.local_folder(config.layout.model(training.name))
    # The folder itself cannot be given: MLflow 3.17 reads the tables of tasks of transformers 4 for it.
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(folder, local_files_only=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
    }
    facts, text = _facts(training), Schema([ColSpec("string")])
    info = Model.log(
        artifact_path=None,
        name=training.name,
        flavor=flavor,
        transformers_model=parts,
        task="text-generation",
        signature=ModelSignature(inputs=text, outputs=text),  # inferring it would import Spark
        input_example=_EXAMPLE,
        validate_serving_input=False,  # it would load the model again and generate text
        metadata=facts,
        # Without a card and requirements, MLflow would ask the model hub for a card, and guess the packages.
        model_card=ModelCard(_card(training.name, facts)),
        pip_requirements=_requirements(folder),
        run_id=existing_run(mlflow, training.run_id),
        step=training.steps,
    )
    return str(info.model_id)


def _facts(training: TrainingRecord) -> dict[str, str]:
    """The data that a model was trained on, as tags and metadata."""
    lineage = training.lineage or {}
    facts = {
        "packed_table": training.packed_uri,
        "packed_version": training.packed_version,
        "manifest_hash": training.manifest_hash,
        "corpus": lineage.get("corpus"),
        "refined_version": lineage.get("refined_version"),
        "tokenizer": training.tokenizer,
        "fingerprint": training.fingerprint,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _card(name: str, facts: dict[str, str]) -> str:
    """A model card in the hub's format."""
    table = json.dumps(facts, indent=2, sort_keys=True)
    return f"---\nlibrary_name: transformers\n---\n# {name}\n\n```json\n{table}\n```\n"


def _requirements(folder: Path) -> list[str]:
    """The packages that load the model, with their installed versions."""
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = [*_PACKAGES, *(["mambapy"] if architecture.get("use_mambapy") else [])]
    # A broken installation has no name.
    installed = {str(package.metadata["Name"]).lower() for package in importlib.metadata.distributions()}
    # A local build (2.13.0+cpu) is not in any index.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names if name in installed]
