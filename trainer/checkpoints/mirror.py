"""The copy of a training's checkpoints under a root that is not local.

Input: the local folder of the checkpoints (checkpoint.py) and the URI of their place under the root. Output: the same
files there, through fsspec: `run.json`, and `step-<N>/state.pt` before `step-<N>/state.json`, so that a step whose
`state.json` is there is whole. The copy is what counts: a training that goes on elsewhere fetches its newest whole
step, and local steps of another training are removed. Rank 0 only; the uploads run in the thread of
checkpoint_writer.py.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import MiniplmError, first_line
from miniplm_udf.storage_errors import explain

LOGGER = logging.getLogger("miniplm.trainer.checkpoint")

_RUN, _TENSORS, _STATE = "run.json", "state.pt", "state.json"


class Mirror:
    """The checkpoints of one training under a root that is not local.

    Args:
        uri: URI of their folder.

    Attributes:
        place: the URI without secrets, for messages.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self.place = uri, storage.redact(uri)

    def fetch(self, folder: Path) -> None:
        """Makes the newest whole step of the copy local, and removes local steps of another training.

        Args:
            folder: the local folder.

        Raises:
            MiniplmError: the storage cannot be read.
        """
        with self._named_errors("read"):
            run = storage.read_json(storage.join(self._uri, _RUN)) or {}
            local = storage.read_json(str(folder / _RUN)) or {}
            if not run or run.get("tracking_id") != local.get("tracking_id"):
                shutil.rmtree(folder, ignore_errors=True)
            if not run:
                return
            storage.write_json(str(folder / _RUN), run)
            names = [name for name in storage.list_folder(self._uri) if name.startswith("step-")]
            for name in sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True):
                if self._fetch_step(name, folder):
                    return

    def _fetch_step(self, name: str, folder: Path) -> bool:
        """Makes a step local, unless it is; False if it is not whole."""
        try:
            state = storage.read_text(storage.join(self._uri, name, _STATE))
            checksum = json.loads(state).get("sha256")
        except (FileNotFoundError, ValueError, AttributeError):
            return False
        target, staging = folder / name, folder / f".{name}.tmp"
        if (target / _STATE).is_file() and (target / _STATE).read_text(encoding="utf-8") == state:
            return True
        LOGGER.info("fetching the checkpoint %s/%s", self.place, name)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        filesystem, path = fsspec.core.url_to_fs(storage.join(self._uri, name, _TENSORS))
        try:
            filesystem.get_file(path, str(staging / _TENSORS))
        except FileNotFoundError:
            return False
        with open(staging / _TENSORS, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                LOGGER.warning("%s/%s is damaged: resuming from an older checkpoint", self.place, name)
                shutil.rmtree(staging, ignore_errors=True)
                return False
        (staging / _STATE).write_text(state, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
        return True

    def publish(self, step: Path) -> None:
        """Copies a whole local step.

        Args:
            step: its local folder.

        Raises:
            MiniplmError: the storage cannot be written.
        """
        with self._named_errors("written"):
            storage.upload_folder(step, storage.join(self._uri, step.name), last=[_STATE])

    def keep_only(self, names: Collection[str]) -> None:
        """Removes the steps that are not named.

        Args:
            names: names of the folders that stay.

        Raises:
            MiniplmError: the storage cannot be written.
        """
        with self._named_errors("written"):
            for name in storage.list_folder(self._uri):
                if name.startswith("step-") and name not in names:
                    # First the file that makes it whole.
                    storage.remove_folder(storage.join(self._uri, name, _STATE))
                    storage.remove_folder(storage.join(self._uri, name))

    def write_run(self, folder: Path) -> None:
        """Copies `run.json`.

        Args:
            folder: the local folder.

        Raises:
            MiniplmError: the storage cannot be written.
        """
        with self._named_errors("written"):
            text = (folder / _RUN).read_text(encoding="utf-8")
            storage.write_text(storage.join(self._uri, _RUN), text)

    @contextlib.contextmanager
    def _named_errors(self, verb: str) -> Iterator[None]:
        """Turns an error of the block into one that names the place.

        Raises:
            MiniplmError: the block failed.
        """
        try:
            yield
        except Exception as error:  # the clients of object storages have no common class
            reason = explain(error) or first_line(error)
            raise MiniplmError(
                f"{self.place}: the checkpoints cannot be {verb}: {reason}; the same command resumes from the newest "
                "whole checkpoint"
            ) from error
