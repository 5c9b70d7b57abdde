"""Checkpoints of a training run: what a killed run needs to end with the weights it would have had.

Owns the folder `<root>/_checkpoints/train/<name>/` (under this node's model cache where `root` is not local), with
`run.json` (fingerprint, MLflow run id) and `step-<N>/` = `state.pt` (weights, optimiser) and `state.json` (steps
done, seconds, last loss, fingerprint). The data order needs no state: it is a function of the step. A `step-<N>`
appears by one rename, so a kill leaves the one before. Written by rank 0 alone, read by all: ranks on several nodes
must share the folder.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from miniplm_udf import storage

LOGGER = logging.getLogger("miniplm.trainer.checkpoint")


def checkpoint_folder(checkpoints_uri: str) -> Path:
    """The local folder of a run's checkpoints, from the URI that the config gives it."""
    if storage.is_local(checkpoints_uri):
        return Path(storage.local_path(checkpoints_uri))
    return storage.cache_folder() / "train" / hashlib.sha256(checkpoints_uri.encode()).hexdigest()[:32]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: see `checkpoint_folder`.
        fingerprint: of config, data and tokenizer; checkpoints of another one are not used, and go at the first save.
        keep: newest ones to keep, at least 1.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int):
        self.folder, self.fingerprint, self.keep = folder, fingerprint, max(1, keep)

    def _steps(self) -> list[tuple[int, Path]]:
        """Whole checkpoints, the newest first."""
        found = [(path.name.removeprefix("step-"), path) for path in self.folder.glob("step-*")]
        return sorted(((int(step), path) for step, path in found if step.isdigit()), reverse=True)

    def run_id(self) -> str | None:
        """The MLflow run that this fingerprint was started under, if it was."""
        raw = self._read(self.folder / "run.json")
        return str(raw["run_id"]) if raw and raw["fingerprint"] == self.fingerprint else None

    def set_run_id(self, run_id: str) -> None:
        storage.write_json(
            str(self.folder / "run.json"),
            {"fingerprint": self.fingerprint, "run_id": run_id},
        )

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts the newest checkpoint of this fingerprint into model and optimiser.

        Returns:
            Its `state.json`, or None where there is none.
        """
        for step, path in self._steps():
            state = self._read(path / "state.json")
            if state is None or state["fingerprint"] != self.fingerprint:
                LOGGER.warning(
                    "%s is of another config, data or tokenizer: not resumed, gone at the next save",
                    path,
                )
                continue
            tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(tensors["model"])
            optimizer.load_state_dict(tensors["optimizer"])
            LOGGER.info("resuming after step %d from %s", step, path)
            return state
        return None

    def save(
        self,
        steps_done: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        facts: dict[str, Any],
    ) -> Path:
        """Writes `step-<steps_done>`, then removes what is not to be kept.

        Args:
            steps_done: optimiser steps that the weights have had.
            model: without its DDP wrapper.
            optimizer: of it.
            facts: plain data to find again (seconds, last loss).
        """
        target = self.folder / f"step-{steps_done}"
        staging = self.folder / f".step-{steps_done}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with open(staging / "state.pt", "wb") as handle:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                handle,
            )
            handle.flush()
            os.fsync(handle.fileno())  # or the rename could reach the disk before the data
        state = {**facts, "steps_done": steps_done, "fingerprint": self.fingerprint}
        storage.write_json(str(staging / "state.json"), state)
        shutil.rmtree(target, ignore_errors=True)  # only one of another fingerprint can stand there
        os.replace(staging, target)
        self._remove_old()
        return target

    def _remove_old(self) -> None:
        kept = 0
        for _, path in self._steps():
            state = self._read(path / "state.json")
            if state is not None and state["fingerprint"] == self.fingerprint and kept < self.keep:
                kept += 1
            else:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all, for a model that is to be trained anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return raw if isinstance(raw, dict) else None
