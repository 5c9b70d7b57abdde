"""A real MLflow server on loopback, which a test starts and stops. Needs MLflow alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.support.ports import free_port


class MlflowServer:
    """A real server on loopback, with its database in a folder, which a test stops and starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db"
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        line = [sys.executable, "-m", "mlflow", "server", *place, store, f"--artifacts-destination={self.folder}/files"]
        # Without its jobs, which no test needs, the server is two processes instead of ten.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True, env=environment)
        deadline = time.monotonic() + 300
        while not self.is_healthy():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        with contextlib.suppress(requests.exceptions.RequestException):
            return requests.get(f"{self.uri}/health", timeout=5).ok
        return False

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
