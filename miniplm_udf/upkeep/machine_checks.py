"""Checks of this machine before a command starts: the root, free disk, ports. Driver only, no Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy. Writes nothing: `preflight.
require_writable` writes an empty file once no check has found anything. Only a local root is looked at.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.upkeep.input_checks import text_bytes
from miniplm_udf.upkeep.machine import existing

# `instances` holds each text once, compressed by Snappy to about half; the other tables and the checkpoints need less.
_TABLE_BYTES_PER_TEXT_BYTE = 0.5


def root_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields why the root cannot be made or written.

    Args:
        config: the experiment.
    """
    if not config.root or not storage.is_local(config.root):
        return
    path = Path(storage.local_path(config.root))
    # A link that leads nowhere is in the way, too.
    place = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
    if not place.is_dir():
        yield f"root: expected a folder that can be made and written, found that {place} is a file; choose another root"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield (
            f"root: expected a folder that can be made and written, found that {place} cannot be written; choose "
            "another folder with root=FOLDER, or have its owner permit writing"
        )


def disk_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields that the tables of a root which has ingested nothing yet do not fit on its disk.

    Args:
        config: the experiment.
    """
    n_bytes = text_bytes(config) if config.root and storage.is_local(config.root) else None
    if not n_bytes or storage.exists(config.layout.stage("ingest")):
        return
    place = existing(Path(storage.local_path(config.root)))
    needed, free = n_bytes * _TABLE_BYTES_PER_TEXT_BYTE, shutil.disk_usage(place).free
    if free < needed:
        yield (
            f"root: expected about {needed / 1e9:,.3g} GB of free disk for the tables of {n_bytes / 1e9:,.3g} GB of "
            f"text, found {free / 1e9:,.3g} GB at {place}; free some, or choose a root on another disk with root=FOLDER"
        )


def port_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields that the port of the metrics cannot be opened.

    Args:
        config: the experiment.
    """
    port = config.stream.metrics_port
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield (
                f"stream.metrics_port: expected a free port, found that {port} cannot be opened "
                f"({error.strerror or error}); choose another port, or null"
            )
