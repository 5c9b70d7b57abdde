"""Describes a start of a training for MLflow: the resolved config, the code, the packages, the devices and the data.

Input: the experiment, the place of this process among the ranks, and the packed table. Output: texts by the name of
their file (`start_files`), and tags. Logs nothing. Secrets are not in the texts: the config is printable, and no
environment variable is read. Rank 0 only.
"""

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, to_yaml
from miniplm_udf.revision import code_commit, code_revision
from miniplm_udf.store.provenance import PackedMetadata
from trainer.ranks.distributed import World

COMMIT_TAG = "mlflow.source.git.commit"
_BRANCH_TAG, _REPOSITORY_TAG = "mlflow.source.git.branch", "mlflow.source.git.repoURL"


def start_files(config: ExperimentConfig, world: World) -> dict[str, str]:
    """Returns the texts that describe a start of a training, by the name of their file.

    Args:
        config: the experiment.
        world: the place of this process among the ranks.

    Returns:
        `config.yaml`, which the commands read again; `environment.json`; and `requirements.txt` with the version of
        every installed package.
    """
    environment = {
        "code_revision": code_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "ranks": world.size,
        "machines": world.nodes,
        "device": device_name(world),
        "cuda": torch.version.cuda if world.device.type == "cuda" else None,
    }
    return {
        "config.yaml": to_yaml(config),
        "environment.json": json.dumps(environment, indent=2),
        "requirements.txt": "\n".join(installed_packages()) + "\n",
    }


def start_tags(world: World) -> dict[str, str]:
    """Returns the tags of the newest start of a training: the code's revision, the device and the number of ranks.

    Args:
        world: the place of this process among the ranks.
    """
    return {"code_revision": code_revision(), "device": device_name(world), "ranks": str(world.size)}


def device_name(world: World) -> str:
    """Returns the name of this rank's GPU, or `cpu`.

    Args:
        world: the place of this process among the ranks.
    """
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type


def installed_packages() -> list[str]:
    """The installed packages as `name==version`, sorted."""
    packages = {
        f"{package.metadata['Name']}=={package.version}"
        for package in importlib.metadata.distributions()
        if package.metadata["Name"] is not None  # a broken installation
    }
    return sorted(packages, key=str.lower)


def table_tags(uri: str, version: int, digest: str, lineage: PackedMetadata) -> dict[str, str]:
    """Returns the tags of the packed table that a model is trained on, and of the corpus in it.

    Args:
        uri: URI of the table.
        version: its Delta version. A tag has it because MLflow's `DeltaDatasetSource` drops version 0.
        digest: manifest hash of the version.
        lineage: `userMetadata` of the table.
    """
    revisions = _find(lineage.get("refined_metadata"), "model_revisions")
    tags = {
        "delta_table_uri": storage.redact(uri),
        "delta_table_version": version,
        "manifest_hash": digest,
        "corpus": lineage.get("corpus"),
        "refined_version": lineage.get("refined_version"),
        "model_revisions": json.dumps(revisions, sort_keys=True) if revisions else None,
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def _find(value: Any, key: str) -> Any:
    """The first value of `key` in nested dicts, searched depth first; None if there is none."""
    if not isinstance(value, dict):
        return None
    if key in value:
        return value[key]
    return next((match for inner in value.values() if (match := _find(inner, key)) is not None), None)


def code_tags(tags: dict[str, str]) -> dict[str, str | None]:
    """Returns the changes that make a run's tags describe this package's code.

    MLflow itself records the git repository of the program's main file, which may be another one.

    Args:
        tags: the run's tags.

    Returns:
        New value by tag; None for a tag that has to be removed.
    """
    commit = code_commit()
    changes: dict[str, str | None] = {}
    if commit != tags.get(COMMIT_TAG):
        changes = {COMMIT_TAG: commit, _BRANCH_TAG: None, _REPOSITORY_TAG: None}
    elif _REPOSITORY_TAG in tags:  # the URI of a remote may have a password
        changes = {_REPOSITORY_TAG: storage.redact(tags[_REPOSITORY_TAG])}
    return {tag: value for tag, value in changes.items() if value is not None or tag in tags}
