"""Checkpoints of a training: everything that a killed run needs to reach the same weights.

Owns the folder `<root>/_checkpoints/train/<name>/`; if `root` is not local, a folder in this node's model cache that is
copied there after each save (mirror.py). It has `run.json` (fingerprint, MLflow run id, id of the training, the model
that it replaces) and one `step-<N>/` per checkpoint, with `state.pt` (`trainer.ranks.state.Tensors`) and `state.json`
(steps done, seconds, last loss, points that MLflow lacks, fingerprint and the values behind it, SHA-256 of `state.pt`).
The data order is a function of the step and needs no state. A `step-<N>` appears by one rename after its files are on
the disk, so a kill or a full disk leaves the previous checkpoint; older checkpoints are removed afterwards. A damaged
checkpoint is found by its checksum and skipped with a warning. Rank 0 writes, in a thread (checkpoint_writer.py); all
ranks compare what they read: ranks on several nodes must share the folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError, MiniplmError, reason
from miniplm_udf.storage import Json
from trainer.checkpoints.mirror import Mirror
from trainer.ranks.state import Tensors
from trainer.tracking.outbox import Point

LOGGER = logging.getLogger("miniplm.trainer.checkpoint")


def checkpoint_folder(checkpoints_uri: str) -> Path:
    """Returns the local folder of a training's checkpoints.

    Args:
        checkpoints_uri: URI of the checkpoint under the root.

    Returns:
        The same folder if the URI is local; otherwise a folder in this node's model cache, named by the URI's hash.
    """
    if storage.is_local(checkpoints_uri):
        return Path(storage.local_path(checkpoints_uri))
    return storage.cache_folder() / "train" / hashlib.sha256(checkpoints_uri.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class SavedState:
    """The numbers in a checkpoint.

    Attributes:
        steps_done: optimiser steps that the weights have had.
        seconds: training time so far, without evaluations.
        loss: loss of the last step, in nats per token; None before the first step.
        points: points of the curve that MLflow does not have yet; a resumed training logs them.
    """

    steps_done: int
    seconds: float = 0.0
    loss: float | None = None
    points: tuple[Point, ...] = ()


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: see `checkpoint_folder`.
        fingerprint: hash of config, data, tokenizer and teacher. Checkpoints with another fingerprint are not used.
        keep: number of newest checkpoints to keep, at least 1.
        settings: the values behind the fingerprint, as text by name, for messages.
        replaceable: fingerprints of finished trainings, whose checkpoints are removed at the first save.
        mirror: the copy under a root that is not local.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: int, settings: Mapping[str, str] | None = None,
        replaceable: Collection[str] = (), mirror: Mirror | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.fingerprint, self.keep, self.replaceable = folder, fingerprint, keep, replaceable
        self.settings, self._mirror = dict(settings or {}), mirror
        # For messages: what the user would delete.
        self._place = str(folder) if mirror is None else mirror.place

    def fetch(self) -> None:
        """Fetches the newest checkpoint of a root that is not local; call it on rank 0 before anything else.

        Raises:
            MiniplmError: the storage cannot be read.
        """
        if self._mirror is not None:
            self._mirror.fetch(self.folder)

    def _steps(self) -> list[tuple[int, Path]]:
        """(step, folder) of each checkpoint, the newest first."""
        folders = [(path.name.removeprefix("step-"), path) for path in self.folder.glob("step-*")]
        return sorted(((int(step), path) for step, path in folders if step.isdigit()), reverse=True)

    def run_id(self) -> str | None:
        """The MLflow run in which a training with this fingerprint was started, or None."""
        return self._run().get("run_id")

    def set_run_id(self, run_id: str) -> None:
        """Records the MLflow run of this training.

        Args:
            run_id: the run's id in MLflow.

        Raises:
            MiniplmError: the file cannot be written.
        """
        self._write_run({**self._run(), "run_id": run_id})

    def tracking_id(self) -> str:
        """The id of this training in MLflow's tags and in other trackers; created and recorded at the first call.

        Raises:
            MiniplmError: the file cannot be written.
        """
        recorded = self._run().get("tracking_id")
        if recorded is not None:
            return str(recorded)
        new = uuid.uuid4().hex
        self._write_run({**self._run(), "tracking_id": new})
        return new

    def is_replacing(self, model_id: str | None) -> bool:
        """Whether this training was started by `replace`, for this model.

        Args:
            model_id: identifies the finished model that is there now; None: there is none, because the replacement was
                stopped while it was written.
        """
        replaced = self._run().get("replaces")
        return replaced is not None and model_id in (None, replaced)

    def replace(self, model_id: str) -> None:
        """Removes all checkpoints, and records that the training begins again to replace a finished model.

        Args:
            model_id: identifies the finished model that is there now.

        Raises:
            MiniplmError: the file cannot be written.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self._write_run({"replaces": model_id})
        if self._mirror is not None:
            self._mirror.keep_only(())

    def _run(self) -> Json:
        """The content of `run.json`; empty if it belongs to a training with another fingerprint."""
        raw = _read(self.folder / "run.json") or {}
        return raw if raw.get("fingerprint") == self.fingerprint else {}

    def _write_run(self, content: Json) -> None:
        try:
            storage.write_json(str(self.folder / "run.json"), {**content, "fingerprint": self.fingerprint})
        except OSError as error:
            raise MiniplmError(self._cannot_write(self.folder / "run.json", error)) from error
        if self._mirror is not None:
            self._mirror.write_run(self.folder)

    def newest_whole(self, model: torch.nn.Module) -> int | None:
        """Finds the newest usable checkpoint: same fingerprint, undamaged, same shapes. Warns about each damaged one.

        Args:
            model: only the names and shapes of its weights are read.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            CorpusError: all checkpoints are damaged, or all belong to another, unfinished training.
        """
        damaged: list[str] = []
        foreign: list[tuple[Path, Mapping[str, str]]] = []
        for step, path in self._steps():
            state = _read(path / "state.json")
            if state is not None and state.get("fingerprint") != self.fingerprint:
                if state.get("fingerprint") not in self.replaceable:
                    foreign.append((path, state.get("settings") or {}))
                continue
            problem = _damage(path, state) or _misfit(path / "state.pt", model)
            if problem is None:
                return step
            damaged.append(f"{path.name}: {problem}")
            LOGGER.warning("%s is damaged (%s): resuming from an older checkpoint", path, problem)
        if damaged:
            raise CorpusError(
                f"{self._place}: expected an undamaged checkpoint to resume from, found none ({'; '.join(damaged)}); "
                "restore the folder, or delete it to train from the first step"
            )
        if foreign:
            path, recorded = foreign[0]
            raise CorpusError(
                f"{path} is the checkpoint of another, unfinished training: {self._differences(recorded)}; go back to "
                f"these values to resume it, or delete {self._place} to give it up"
            )
        return None

    def _differences(self, recorded: Mapping[str, str]) -> str:
        """The settings of another training's checkpoint that this training does not have, for the message."""
        missing = "no value"
        differing = [
            f"{name} {recorded.get(name, missing)} (now {self.settings.get(name, missing)})"
            for name in {**recorded, **self.settings}
            if recorded.get(name) != self.settings.get(name)
        ]
        # Earlier releases recorded no values.
        unknown = "its sections train and architecture, packed table, tokenizer or teacher differ"
        return f"it has {', '.join(differing)}" if recorded and differing else unknown

    def checksum(self, step: int) -> str:
        """Computes the SHA-256 of a checkpoint as this process reads it; ranks compare it.

        Args:
            step: the step of the checkpoint, chosen by rank 0.

        Returns:
            Fingerprint and checksum, or the reason why the checkpoint cannot be read.
        """
        path = self.folder / f"step-{step}"
        state = _read(path / "state.json")
        return _damage(path, state) or f"{(state or {}).get('fingerprint')} {(state or {}).get('sha256')}"

    def load(self, step: int) -> tuple[SavedState, Tensors]:
        """Reads a checkpoint.

        Args:
            step: a step that `newest_whole` returned.

        Returns:
            The checkpoint's numbers and its tensors.
        """
        path = self.folder / f"step-{step}"
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        LOGGER.info("resuming after step %d from %s", step, path)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        points = tuple(Point(**point) for point in state.get("points", ()))
        return SavedState(state["steps_done"], state["seconds"], state["loss"], points), tensors

    def save(self, state: SavedState, tensors: Tensors) -> Path:
        """Writes `step-<steps_done>`, then removes older and unusable checkpoints.

        Args:
            state: the numbers of the checkpoint.
            tensors: weights and optimiser state, which nothing changes during the call.

        Returns:
            The folder of the checkpoint.

        Raises:
            MiniplmError: the files cannot be written, for example because the disk is full. No partial file is left.
        """
        target = self.folder / f"step-{state.steps_done}"
        staging = self.folder / f".step-{state.steps_done}.tmp"
        try:
            self._remove_leftovers()
            staging.mkdir(parents=True)
            self._write(staging, state, tensors)
            if target.exists():  # it has another fingerprint, or is damaged
                os.replace(target, self.folder / f".step-{state.steps_done}.old")
            os.replace(staging, target)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if a file cannot be written
            shutil.rmtree(staging, ignore_errors=True)
            raise MiniplmError(self._cannot_write(target, error)) from error
        if self._mirror is not None:
            self._mirror.publish(target)
        self._remove_old(state.steps_done)
        if self._mirror is not None:
            self._mirror.keep_only([path.name for _, path in self._steps()])
        return target

    def _write(self, staging: Path, state: SavedState, tensors: Tensors) -> None:
        with open(staging / "state.pt", "wb") as handle:
            torch.save(tensors, handle)
            handle.flush()
            os.fsync(handle.fileno())  # without it, the rename could reach the disk before the data
        sums = {"fingerprint": self.fingerprint, "sha256": _sha256(staging / "state.pt"), "settings": self.settings}
        with open(staging / "state.json", "w", encoding="utf-8") as text:
            json.dump({**dataclasses.asdict(state), **sums}, text)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(staging)

    def _cannot_write(self, target: Path, error: Exception) -> str:
        """The message for a save that failed."""
        cause = error if isinstance(error, OSError) else error.__context__ or error
        steps = [path.name for _, path in self._steps()]
        left = f"{steps[0]} is whole, and the same command resumes from it" if steps else "no step was saved before"
        try:
            free = f", {shutil.disk_usage(self.folder).free // 2**20:,} MiB free"
        except OSError:
            free = ""
        return (
            f"{target}: cannot be written ({reason(cause)}{free}): free space there, lower "
            f"train.keep_checkpoints, or move root to another disk; {left}"
        )

    def _remove_old(self, newest: int) -> None:
        """Keeps the newest checkpoints up to the saved step.

        Any checkpoint of a later step is damaged; otherwise this run would have resumed from it.
        """
        kept = 0
        for step, path in self._steps():
            state = _read(path / "state.json")
            is_mine = state is not None and state.get("fingerprint") == self.fingerprint
            if is_mine and step <= newest and kept < self.keep:
                kept += 1
            else:
                shutil.rmtree(path, ignore_errors=True)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes the temporary folders of saves that were killed."""
        for path in [*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.old")]:
            shutil.rmtree(path, ignore_errors=True)


def _damage(path: Path, state: Json | None) -> str | None:
    """Returns the problem with a checkpoint's files, or None if they are unchanged since the save."""
    if state is None:
        return "state.json is missing or cannot be read"
    file = path / "state.pt"
    if not file.is_file():
        return "state.pt is missing"
    if missing := {"sha256", "steps_done", "seconds", "loss"} - state.keys():
        return f"state.json has no {', '.join(sorted(missing))}"
    if _sha256(file) != state["sha256"]:
        return (
            f"state.pt is cut or overwritten: {file.stat().st_size} bytes with another checksum than when it was saved"
        )
    return None


def _misfit(file: Path, model: torch.nn.Module) -> str | None:
    """Returns how names and shapes in `state.pt` differ from the model's, or None if they are equal."""
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if set(tensors) != {"model", "optimizer"}:
        return f"state.pt holds {sorted(tensors)} instead of model and optimizer"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors["model"].items()}
    names = [name for name in {**expected, **saved} if expected.get(name) != saved.get(name)]
    if names:
        name = names[0]
        return (
            f"{len(names)} weights differ from the model's, first {name}: "
            f"expected shape {expected.get(name)}, found {saved.get(name)}"
        )
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if trained == set(tensors["optimizer"]["state"]):
        return None
    return f"the optimiser has the state of {len(tensors['optimizer']['state'])} weights, the model has {len(trained)}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Json | None:
    """The JSON object in a file, or None if the file is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not JSON, or not UTF-8
        return None
    return raw if isinstance(raw, dict) else None
