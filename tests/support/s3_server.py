"""An S3 server on loopback, in a process of its own: moto, with every request counted and faults on demand.

`running()` starts it, sets the environment variables that reach it, and yields an `S3Server`. Its objects are in its
memory. `python -m tests.support.s3_server PORT` is the process itself. Besides S3, it answers at `/_test/`: the counts
of the requests, and the list of faults.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec

from miniplm_udf import object_storage
from miniplm_udf.config.object_storage import StorageConfig
from tests.support.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "test-bucket"
_START_SECONDS = 60.0
FaultKind = Literal["slow_down", "error", "denied", "expired", "drop", "drop_after", "unconditional", "unnamed", "hang"]


@dataclasses.dataclass
class RequestFault:
    """What happens to the next requests that match.

    Attributes:
        kind: slow_down, error, denied and expired answer 503, 500, 403 AccessDenied and 400 ExpiredToken; drop closes
            the connection before the request is done, drop_after when it is done; hang waits for `seconds` and then
            does as drop_after; unconditional does the request without its If-None-Match; unnamed leaves the name of the
            condition out of the answer, as MinIO does.
        method: HTTP method, a regular expression.
        path: path of the URL with its query, a regular expression that is searched.
        times: number of requests; -1 is all.
        seconds: see hang.
    """

    kind: FaultKind
    method: str = ".*"
    path: str = ""
    times: int = -1
    seconds: float = 5.0


class S3Server:
    """A running server.

    Attributes:
        url: its endpoint.
        process: the process, for tests that kill it.
    """

    def __init__(self, url: str, process: "subprocess.Popen[bytes]") -> None:
        self.url, self.process = url, process

    def _call(self, method: str, place: str, value: Any = None) -> Any:
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{self.url}/_test/{place}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def requests(self) -> dict[str, int]:
        """The number of requests since `reset`, by `METHOD what status`; what is put, list, get, ..."""
        return dict(self._call("GET", "requests"))

    def log(self) -> list[str]:
        """The requests since `reset`: `METHOD path?query status`."""
        return list(self._call("GET", "log"))

    def reset(self) -> None:
        """Forgets the counts and the faults."""
        self._call("DELETE", "requests")

    def add_fault(self, fault: RequestFault) -> None:
        """Adds a fault, which counts until `reset`."""
        self._call("POST", "faults", dataclasses.asdict(fault))

    def create_bucket(self, name: str = BUCKET) -> str:
        """Creates a bucket, and returns its name."""
        import boto3

        boto3.client("s3", endpoint_url=self.url, region_name="us-east-1").create_bucket(Bucket=name)
        return name


def environment(url: str) -> dict[str, str]:
    """The variables with which a process reaches the server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def reaching(url: str, process: "subprocess.Popen[bytes]") -> Iterator[S3Server]:
    """Makes this process and its children reach a server, and ends the server."""
    before, options = dict(os.environ), dict(fsspec.config.conf)
    try:
        os.environ.update(environment(url))
        object_storage.use(StorageConfig())
        yield S3Server(url, process)
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)
        fsspec.config.conf.clear()
        fsspec.config.conf.update(options)


@contextlib.contextmanager
def running() -> Iterator[S3Server]:
    """Runs a server with one empty bucket (`BUCKET`), and makes this process reach it."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.support.s3_server", str(port)], cwd=REPOSITORY)
    with reaching(f"http://127.0.0.1:{port}", process) as server:
        _wait(server)
        server.create_bucket()
        server.reset()
        yield server


def _wait(server: S3Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            server.requests()
            return
        except OSError:
            if time.monotonic() > deadline or server.process.poll() is not None:
                raise
            time.sleep(0.1)


class _Watched:
    """The WSGI application around moto's: counts requests and applies faults."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner, self._lock = inner, threading.Lock()
        self._faults: list[RequestFault] = []
        self._log: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else "")
        if path.startswith("/_test/"):
            return self._control(environ, start)
        fault = self._fault(environ["REQUEST_METHOD"], path)
        if fault is not None and fault.kind in _ANSWERS:
            return self._refuse(fault.kind, environ["REQUEST_METHOD"], path, environ, start)
        if fault is not None and fault.kind == "drop":
            self._note(environ["REQUEST_METHOD"], path, "dropped")
            return _drop(environ)
        if fault is not None and fault.kind == "unconditional":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        statuses: list[tuple[str, list[tuple[str, str]]]] = []

        def keep(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], None]:
            statuses.append((status, headers))
            return lambda data: None

        body = b"".join(self._inner(environ, keep))
        status, headers = statuses[-1]
        if fault is not None and fault.kind == "unnamed":
            body = re.sub(rb"<Condition>.*?</Condition>", b"", body)
            headers = [(name, str(len(body)) if name == "Content-Length" else value) for name, value in headers]
        self._note(environ["REQUEST_METHOD"], path, status.split()[0])
        if fault is not None and fault.kind in ("drop_after", "hang"):
            time.sleep(fault.seconds if fault.kind == "hang" else 0)
            return _drop(environ)
        start(status, headers)
        return [body]

    def _fault(self, method: str, path: str) -> RequestFault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _note(self, method: str, path: str, status: str) -> None:
        with self._lock:
            self._log.append(f"{method} {path} {status}")

    def _refuse(self, kind: str, method: str, path: str, environ: dict[str, Any], start: Any) -> list[bytes]:
        status, code = _ANSWERS[kind]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        self._note(method, path, status.split()[0])
        body = b"" if method == "HEAD" else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def _control(self, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        result: Any = None
        with self._lock:
            if environ["REQUEST_METHOD"] == "DELETE":
                self._log.clear()
                self._faults.clear()
            elif environ["REQUEST_METHOD"] == "POST":
                self._faults.append(
                    RequestFault(**json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
                )
            elif environ["PATH_INFO"].endswith("/log"):
                result = self._log
            else:
                result = Counter(map(_summary, self._log))
            body = json.dumps(result).encode()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


_ANSWERS = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "error": ("500 Internal Server Error", "InternalError"),
    "denied": ("403 Forbidden", "AccessDenied"),
    "expired": ("400 Bad Request", "ExpiredToken"),
}


def _summary(line: str) -> str:
    method, rest = line.split(" ", 1)
    path, status = rest.rsplit(" ", 1)
    what = {"GET": "list" if "list-type" in path or "prefix=" in path else "get"}.get(method, method.lower())
    return f"{what} {status}"


def _drop(environ: dict[str, Any]) -> Iterable[bytes]:
    """Closes the connection without an answer."""
    connection = environ["werkzeug.socket"]
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError("dropped by the test")


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # a connection is kept for further requests

        def log(self, *_: Any, **__: Any) -> None:
            """Logs nothing."""

    application = _Watched(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=Quiet).serve_forever()


if __name__ == "__main__":
    main()
