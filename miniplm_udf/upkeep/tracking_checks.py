"""Checks of MLflow's server before a command starts: whether something listens at its address. Driver only, no Spark.

Input: a config. Output: warnings, each a sentence with its key and its remedy; never a problem, because the server may
be started later, and a training keeps its points until then. Connects once, for at most a second; sends nothing.
"""

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig

_CONNECT_SECONDS = 1.0
_PORTS = {"http": 80, "https": 443}


def tracking_warnings(config: ExperimentConfig) -> Iterator[str]:
    """Yields that nothing listens at the address of MLflow's server.

    Args:
        config: the experiment; a store that is no server, or is behind a proxy, is not checked.
    """
    uri = config.mlflow_uri()
    reason = _unreachable(uri)
    if reason:
        named_by = "" if config.mlflow.tracking_uri else " (from MLFLOW_TRACKING_URI)"
        yield (
            f"mlflow.tracking_uri{named_by}: expected a server at {storage.redact(uri)}, found none that answers "
            f"({reason}); start it (`mlflow server --host HOST --port PORT`), or correct the key. Without the server, "
            "each training runs and keeps its numbers, but waits for the server at its end, up to "
            f"mlflow.wait_seconds ({config.mlflow.wait_seconds:g} s)"
        )


def _unreachable(uri: str) -> str:
    """Why no connection can be opened; empty if one can, or if that cannot be told."""
    try:
        parts = urllib.parse.urlsplit(uri)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError as error:  # the port is no number
        return str(error) if uri.startswith(("http:", "https:")) else ""
    if parts.scheme not in _PORTS or not host or port is None or _is_behind_proxy(parts.scheme, host):
        return ""
    reasons: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
            reasons.append("")
        except OSError as error:
            reasons.append(error.strerror or str(error))

    # A name server that does not answer takes longer than the limit of the connection.
    thread = threading.Thread(target=connect, daemon=True, name="miniplm-mlflow")
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return reasons[0] if reasons else f"no answer in {_CONNECT_SECONDS:g} s"


def _is_behind_proxy(scheme: str, host: str) -> bool:
    proxies = urllib.request.getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host)
