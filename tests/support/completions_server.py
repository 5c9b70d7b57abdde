"""An HTTP server with OpenAI's completions endpoint over a plain transformers model.

    with CompletionsServer(plain_model(folder)) as server: ...  # server.url

Owns a thread and a port on loopback. Answers as vLLM does with `echo` and `logprobs`. The functions in `faults` are
called first, one for each request, in order; one that returns a response replaces the answer. Status 0 closes the
connection without an answer. Nothing is retried here.
"""

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import torch

MODEL = "tiny"
# (status, headers, body); a body that is a dict is sent as JSON.
Response = tuple[int, dict[str, str], Any]
Fault = Callable[[dict[str, Any], Any], Response | None]


class CompletionsServer:
    """Serves from `__enter__` to `__exit__`.

    Attributes:
        faults: what to do instead of an answer, for the next requests; gets the request and the answer it would have.
        requests: the requests so far.
        keys: the values of the header Authorization.

    Args:
        model: the model.
        tokenizer: gives the text of each id in the answers; None answers without texts.
        longest: tokens of a prompt and the generated one; a longer prompt is refused with status 400.
    """

    def __init__(self, model: Any, tokenizer: Any = None, longest: int = 10**6) -> None:
        self._model, self._tokenizer, self._longest, self._lock = model, tokenizer, longest, threading.Lock()
        self.faults: deque[Fault] = deque()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, body = server._respond(self.path, request, self.headers.get("Authorization"))
                if status == 0:
                    self.close_connection = True
                    return
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client has gone
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Prints nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "CompletionsServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _respond(self, path: str, request: dict[str, Any], key: str | None) -> Response:
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
            fault = self.faults.popleft() if self.faults else None
        if path != "/v1/completions" or request["model"] != MODEL:
            return 404, {}, {"error": {"message": f"the model {request['model']} does not exist"}}
        if max(map(len, request["prompt"])) + 1 > self._longest:
            return 400, {}, {"error": {"message": f"the longest input has {self._longest} tokens"}}
        choices = [self._choice(number, ids) for number, ids in enumerate(request["prompt"])]
        answer = {"id": "x", "object": "text_completion", "created": 0, "model": MODEL, "choices": choices}
        return (fault(request, answer) if fault is not None else None) or (200, {}, answer)

    @torch.inference_mode()
    def _choice(self, number: int, ids: list[int]) -> dict[str, Any]:
        with self._lock:
            logits_TV = self._model(torch.tensor([ids])).logits[0]
        log_p_TV = torch.log_softmax(logits_TV, dim=-1)
        next_id = int(log_p_TV[-1].argmax())
        values = [float(log_p_TV[position, after]) for position, after in enumerate([*ids[1:], next_id])]
        logprobs = {
            "token_logprobs": [None, *values],
            "tokens": self._tokenizer and [self._tokenizer.decode([token]) for token in [*ids, next_id]],
            "text_offset": [0] * (len(ids) + 1),
            "top_logprobs": [None] * (len(ids) + 1),
        }
        return {"index": number, "text": "", "finish_reason": "length", "logprobs": logprobs}
