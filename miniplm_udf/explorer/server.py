"""Serves the score explorer on 127.0.0.1: one page, drawn by jinja2 with autoescape, without a script. No Spark.

Inputs: `ExploredCorpus`; a request's query, whose bad values count as absent. Output: HTML. Only GET; a request that
names another host is refused, so that no page of another site can read the texts through a name of its own. The page's
policy forbids every script and every request to elsewhere.
"""

import functools
import http.server
import math
import urllib.parse
from typing import Any

from miniplm_udf.explorer.candidates import ORDERS, ROWS_PER_PAGE, ExploredCorpus, Filter

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"


def wanted(query: str) -> Filter:
    """Returns the filter that the query of a request asks for.

    Args:
        query: the part of the address after `?`; a value that cannot be read counts as absent.
    """
    values = {key: entries[-1] for key, entries in urllib.parse.parse_qs(query).items()}
    order, page = values.get("order", "cut"), values.get("page", "0")
    return Filter(
        source=values.get("source", ""), low=_number(values.get("low")), high=_number(values.get("high")),
        text=values.get("text", ""), order=order if order in ORDERS else "cut",
        page=min(int(page), 10**9) if page.isascii() and page.isdigit() and len(page) < 12 else 0,
    )  # fmt: skip


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def draw(candidates: ExploredCorpus, query: str) -> str:
    """Returns the page of a request, as HTML.

    Args:
        candidates: the version that is explored.
        query: the part of the address after `?`.
    """
    chosen = wanted(query)
    sides = {"kept": candidates.side(chosen, "kept"), "dropped": candidates.side(chosen, "dropped")}
    fields = {"source": chosen.source, "low": chosen.low, "high": chosen.high, "text": chosen.text}
    shown = {key: value for key, value in {**fields, "order": chosen.order}.items() if value not in ("", None)}

    def link(page: int) -> str:
        return "?" + urllib.parse.urlencode({**shown, "page": page})

    last = max((side.n_matching - 1) // ROWS_PER_PAGE for side in sides.values())
    return (
        _template().render(
            candidates=candidates, filter=chosen, sides=sides, orders=ORDERS, rows_per_page=ROWS_PER_PAGE,
            before=link(chosen.page - 1) if chosen.page > 0 else None,
            after=link(chosen.page + 1) if chosen.page < last else None,
        )
    )  # fmt: skip


@functools.cache
def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("miniplm_udf.explorer", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def make_server(candidates: ExploredCorpus, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Returns a server that listens on 127.0.0.1; `serve_forever` answers its requests.

    Args:
        candidates: the version that is explored.
        port: the port; 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    class PageHandler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            hosts = {f"{name}:{self.connection.getsockname()[1]}" for name in ("127.0.0.1", "localhost")}
            if self.headers.get("Host") not in hosts:
                self.send_error(403, "This page is for this machine only")
            elif address.path != "/":
                self.send_error(404)
            else:
                self._answer(draw(candidates, address.query).encode("utf-8", "replace"))

        def _answer(self, page: bytes) -> None:
            self.send_response(200)
            for name, value in (
                ("Content-Type", "text/html; charset=utf-8"),
                ("Content-Length", str(len(page))),
                ("Content-Security-Policy", _POLICY),
                ("Referrer-Policy", "no-referrer"),
                ("Cache-Control", "no-store"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *arguments: Any) -> None:
            """Logs no request: a text that is searched for is in its address."""

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), PageHandler)
