"""A hub on loopback: the part of its protocol that fetching a data set or a model needs, over files in a folder."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_server(
    folder: Path, repo: str, kind: Literal["datasets", "models"] = "datasets"
) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder as the data set or the model `repo`.

    Yields:
        The address for HF_ENDPOINT, and the list of requests, which grows.
    """
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            api, files = f"/api/{kind}/{repo}", f"/{repo}/resolve/"
            files = f"/datasets{files}" if kind == "datasets" else files
            if path.startswith(files):
                file = folder / path.removeprefix(files).partition("/")[2]
                if file.is_file():
                    return self._send(file.read_bytes(), "application/octet-stream", with_body)
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
                return self._send_json({"id": repo, "sha": COMMIT, "siblings": names, "private": False}, with_body)
            elif path.startswith(f"{api}/tree/"):
                entries = [
                    {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
                     "oid": _digest(file.read_bytes())}
                    for file in _files(folder)
                ]  # fmt: skip
                return self._send_json(entries, with_body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send_json(self, value: Any, with_body: bool) -> None:
            self._send(json.dumps(value).encode(), "application/json", with_body)

        def _send(self, data: bytes, kind: str, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_digest(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
