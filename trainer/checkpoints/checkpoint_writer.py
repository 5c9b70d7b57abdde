"""Writes checkpoints in a thread, so that the next steps run while the disk works.

Input: the numbers and a copy of the tensors (`trainer.ranks.state.gather`). At most one save runs at a time, and the
next save waits for it, so at most one copy is in memory. An error of the thread is raised at the next `check`, `save`
or `finish`.
Rank 0 only.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.ranks.state import Tensors

LOGGER = logging.getLogger("miniplm.trainer.checkpoint")


class CheckpointWriter:
    """Saves checkpoints in a thread inside a `with` block, whose end waits for the running save.

    Args:
        checkpoints: the checkpoints of the training.
        on_saved: called in the thread after each save, with the checkpoint's step and folder.

    Attributes:
        saved: the numbers of the newest finished checkpoint; None before the first.
    """

    def __init__(
        self, checkpoints: Checkpoints, on_saved: Callable[[int, Path], None] = lambda step, path: None
    ) -> None:
        self._checkpoints, self._on_saved = checkpoints, on_saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[SavedState, Future[Path]] | None = None
        self.saved: SavedState | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.finish()
        elif self._running and (late := self._running[1].exception()) is not None and late is not error:
            LOGGER.warning("%s", late)

    def save(self, state: SavedState, tensors: Tensors) -> None:
        """Starts to save a checkpoint; first waits for the previous save.

        Args:
            state: the numbers of the checkpoint.
            tensors: a copy of the state, which the caller must not use any more.

        Raises:
            MiniplmError: the previous save failed.
        """
        self.finish()
        self._running = (state, self._pool.submit(self._save, state, tensors))

    def _save(self, state: SavedState, tensors: Tensors) -> Path:
        path = self._checkpoints.save(state, tensors)
        self._on_saved(state.steps_done, path)
        return path

    def check(self) -> None:
        """Raises the error of a save that has failed; does not wait.

        Raises:
            MiniplmError: the save failed.
        """
        if self._running is not None and self._running[1].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the running save, if there is one.

        Raises:
            MiniplmError: the save failed.
        """
        if self._running is None:
            return
        (state, future), self._running = self._running, None
        future.result()
        self.saved = state
