"""A standalone Spark cluster on loopback: one master, some workers, pretended GPUs. Ends for certain, finds its pids.

Owns the daemons' processes and their folder (logs, work folders, scratch). Refuses to run a driver: `driver_conf` is
what a driver's session needs. Every process of the cluster, whoever started it (executors, Python workers, scorer
processes), inherits one mark in its environment: by it they are found, told apart by kind, and killed at the end. The
daemons die with the process that started them, too. Linux only. Nothing is retried: what does not come up in a minute
raises with the end of its log.
"""

import contextlib
import ctypes
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.short_lived import JAVA_OPTIONS, SMALL_TABLES

_MARK = "MINIPLM_TEST_CLUSTER"
_PATIENCE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

KINDS = ("master", "worker daemon", "executor", "python worker", "scorer process")


class StandaloneCluster:
    """Starts in `__enter__`, ends in `__exit__`.

    Args:
        folder: for logs, work folders and scratch files.
        workers: worker daemons.
        cores: of each worker, as Spark counts them; may exceed the machine's.
        memory_mb: of each worker, for executors.
        gpus: pretended GPUs of each worker, as a discovery script names them.
        spark_home: a Spark installation; None takes the installation of the running Python.
    """

    def __init__(
        self, folder: Path, workers: int = 2, cores: int = 4, memory_mb: int = 8192, gpus: int = 0,
        spark_home: Path | None = None,
    ) -> None:  # fmt: skip
        import pyspark

        self.folder, self.cores, self.memory_mb, self.gpus = folder, cores, memory_mb, gpus
        self.spark_home = spark_home or Path(pyspark.__file__).parent
        self.url = ""
        self._mark = uuid.uuid4().hex
        self._n_started = 0
        self._workers: list[subprocess.Popen[bytes] | None] = [None] * workers

    def __enter__(self) -> "StandaloneCluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_script(self.discovery_script, f"echo {_gpu_json(self.gpus)}")
        try:
            log = self._start("org.apache.spark.deploy.master.Master", "--port", "0", "--webui-port", "0")[1]
            self.url = _wait_for(log, r"Starting Spark master at (spark://\S+)")
            logs = [self._start_worker(number) for number in range(len(self._workers))]
            for log in logs:
                _wait_for(log, "(Successfully registered) with master")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def discovery_script(self) -> Path:
        return self.folder / "gpus.sh"

    def driver_conf(self, memory_mb: int = 512, cores: int = 1) -> dict[str, str]:
        """Properties of a session whose executors each have so much, and one GPU where the workers have some."""
        conf = {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.memory": "1g",
            "spark.driver.extraJavaOptions": JAVA_OPTIONS,
            "spark.executor.memory": f"{memory_mb}m",
            "spark.executor.cores": str(cores),
            "spark.cores.max": str(cores * len(self._workers)),
            "spark.executor.extraJavaOptions": JAVA_OPTIONS,
            "spark.local.dir": str(self.folder / "scratch"),
            **SMALL_TABLES,
        }
        if self.gpus:
            conf["spark.executor.resource.gpu.amount"] = "1"
            conf["spark.executor.resource.gpu.discoveryScript"] = str(self.discovery_script)
        return conf

    def processes(self, kind: str, app_id: str | None = None) -> list[psutil.Process]:
        """The running processes of a kind, in the whole cluster or of one application."""
        found = []
        for process, environment in self._marked():
            if app_id is not None and f"appId={app_id}&" not in environment.get("SPARK_LOG_URL_STDERR", ""):
                continue
            with contextlib.suppress(psutil.Error):
                if kind_of(process) == kind:
                    found.append(process)
        return found

    def restart_workers(self) -> None:
        """Starts dead daemons again, and waits until the master knows them."""
        dead = [number for number, process in enumerate(self._workers) if process is None or process.poll() is not None]
        for log in [self._start_worker(number) for number in dead]:
            _wait_for(log, "(Successfully registered) with master")

    def stop(self) -> None:
        """Kills every process of the cluster, and the processes that they start meanwhile."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while found := [process for process, _ in self._marked()]:
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=1)
            if time.monotonic() > deadline:
                raise RuntimeError(f"cluster: processes that cannot be killed: {found}")

    def _marked(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    environment = process.environ()
                    if environment.get(_MARK) == self._mark:
                        yield process, environment

    def _start_worker(self, number: int) -> Path:
        self._workers[number], log = self._start(
            "org.apache.spark.deploy.worker.Worker", "--port", "0", "--webui-port", "0", "--cores", str(self.cores),
            "--memory", f"{self.memory_mb}m", "--work-dir", str(self.folder / f"work-{number}"), self.url,
        )  # fmt: skip
        return log

    def _start(self, daemon: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        self._n_started += 1
        log = self.folder / f"{daemon.rsplit('.')[-1].lower()}-{self._n_started}.log"
        command = [str(self.spark_home / "bin/spark-class"), daemon, "--host", "127.0.0.1", *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder,
                env=self._environment(), start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        return process, log

    def _environment(self) -> dict[str, str]:
        """Little of ours: no path of the repository or of its environment reaches an executor."""
        kept = {name: os.environ[name] for name in ("HOME", "JAVA_HOME", "LANG", "TMPDIR") if name in os.environ}
        folders = [folder for folder in os.environ.get("PATH", "").split(":") if not folder.startswith(sys.prefix)]
        gpus = {"amount": self.gpus, "discoveryScript": self.discovery_script}
        options = [f"-Dspark.worker.resource.gpu.{key}={value}" for key, value in gpus.items() if self.gpus]
        return kept | {
            "PATH": ":".join(folders),
            "SPARK_HOME": str(self.spark_home),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": str(self.folder / "scratch"),
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": JAVA_OPTIONS,
            "SPARK_WORKER_OPTS": " ".join(options),
            _MARK: self._mark,
        }


def kind_of(process: psutil.Process) -> str | None:
    """One of KINDS, or None: a Python daemon that forks workers is none, nor is what starts a JVM."""
    line = " ".join(process.cmdline())
    if "org.apache.spark.launcher" in line:
        return None
    if "org.apache.spark.deploy.master.Master" in line:
        return "master"
    if "org.apache.spark.deploy.worker.Worker" in line:
        return "worker daemon"
    if "CoarseGrainedExecutorBackend" in line:
        return "executor"
    if "miniplm_udf.workers.scorer_process" in line:
        return "scorer process"
    parent = process.parent() if "pyspark.daemon" in line else None
    return "python worker" if parent is not None and "pyspark.daemon" in " ".join(parent.cmdline()) else None


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills the process when the thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _gpu_json(gpus: int) -> str:
    addresses = ",".join(f'"{number}"' for number in range(gpus))
    return f'\'{{"name":"gpu","addresses":[{addresses}]}}\''


def _write_script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _wait_for(log: Path, pattern: str) -> str:
    """The first group of the first match in a log that grows."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if match := re.search(pattern, log.read_text(errors="replace")):
            return match.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"{log}: expected {pattern!r} within {_PATIENCE_SECONDS:.0f} s:\n{log.read_text()[-2000:]}")
