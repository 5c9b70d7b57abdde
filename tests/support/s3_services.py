"""Real S3 services on loopback: MinIO and the Versity gateway, built by `go install` where Go is installed.

`running(NAME, folder)` starts a service with one empty bucket (`s3_server.BUCKET`) and makes this process and its
children reach it. Unlike `s3_server`, it counts no requests and makes no faults.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import s3_server
from tests.support.ports import free_port
from tests.support.standalone import die_with_parent

_START_SECONDS = 60.0
_KEY, _SECRET = "test-key", "test-secret"


@dataclasses.dataclass(frozen=True)
class _Program:
    """How a service is installed and started.

    Attributes:
        package: what `go install` takes.
        arguments: its arguments, from its folder of data and its port.
        variables: environment variables of its administrator's key.
    """

    package: str
    arguments: Callable[[str, int], list[str]]
    variables: dict[str, str]


SERVICES = {
    "minio": _Program(
        "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c",
        lambda folder, port: ["server", folder, "--address", f"127.0.0.1:{port}", "--quiet"],
        {"MINIO_ROOT_USER": _KEY, "MINIO_ROOT_PASSWORD": _SECRET},
    ),
    "versitygw": _Program(
        "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
        lambda folder, port: ["--port", f"127.0.0.1:{port}", "--quiet", "posix", folder],
        {"ROOT_ACCESS_KEY_ID": _KEY, "ROOT_SECRET_ACCESS_KEY": _SECRET},
    ),
}


def installed(name: str) -> str:
    """Path of a service's program; skips the test if it is not there and cannot be built."""
    folder = Path.home() / "go" / "bin"
    program = shutil.which(name) or shutil.which(name, path=str(folder))
    if program is None:
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if go is None:
            pytest.skip(f"{name} is not installed, and Go, which builds it, is not either")
        built = subprocess.run([go, "install", SERVICES[name].package], env={**os.environ, "GOBIN": str(folder)})
        if built.returncode != 0:
            pytest.skip(f"{name} could not be built; see above")
        program = str(folder / name)
    return program


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[s3_server.S3Server]:
    """Runs a service that keeps its objects in an existing folder."""
    service, port = SERVICES[name], free_port()
    command = [installed(name), *service.arguments(str(folder), port)]
    process = subprocess.Popen(command, env={**os.environ, **service.variables}, preexec_fn=die_with_parent)
    with s3_server.reaching(f"http://127.0.0.1:{port}", process) as server:
        _wait(port, process)
        server.create_bucket()
        yield server


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5.0).close()
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.2)
