"""Scores texts through a server with OpenAI's completions endpoint that returns log probabilities of the prompt.

Input: the windows of a slice of texts; output: their nats. A window is sent as token ids, so that the server's
tokenizer plays no part, and comes back with the log probability of each id after the first, as vLLM answers. Several
requests run at the same time, in the event loop of a thread; a request that finds the server busy or away is repeated.
An answer that does not fit its request fails the texts of that request; 32 such texts in a row end the
scoring. The key comes from the environment variable OPENAI_API_KEY alone. Executor side; loads no torch. A retry asks
again.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from miniplm_udf import storage
from miniplm_udf.config.sections import ServerConfig
from miniplm_udf.errors import ModelLoadError, ScoringError, first_line
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.results import Failure
from miniplm_udf.scoring.text_scorer import Slice, TextScorer, WindowInput

LOGGER = logging.getLogger("miniplm.scorer")

KEY_VARIABLE = "OPENAI_API_KEY"
# After this many texts in a row without a usable answer, the server is the cause and not the texts.
_MAX_FAILURES_IN_A_ROW = 32
# vLLM writes this in place of minus infinity, which JSON does not have.
_MINUS_INFINITY = -9999.0
# A server that is there accepts a connection at once, however long its answer takes.
_CONNECT_SECONDS = 10.0
# Longest pause between two tries, unless the server asks for a longer one.
_LONGEST_PAUSE_SECONDS = 8.0
# The first request is repeated for this long: whoever starts a stage sees soon that a URL is wrong.
_FIRST_PATIENCE_SECONDS = 30.0
# All requests of a slice are sent in about this many rounds, so that the last round, which is not full, weighs little.
_ROUNDS_PER_SLICE = 4
# The first prompt. Each character is one byte, so the text of each token can be compared.
_PROBE = "The quick brown fox jumps over the lazy dog, and 25 others look on. "
_TOO_LARGE = 413
_LOG_EVERY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The server's answer to a prompt of n ids.

    Attributes:
        log_p: log probabilities of the ids but the first, shape (n - 1,).
        pieces: the server's text of each id; empty if it gives none.
    """

    log_p: np.ndarray
    pieces: list[str]


class ServerScorer(TextScorer):
    """A model on a server that scores texts; `tokens_per_batch` is what all requests at the same time may hold.

    Args:
        server: the server.
        tokenizer: the model's tokenizer (`load_tokenizer`).
        description: the model's description.

    Raises:
        ModelLoadError: the library is missing, the key cannot be sent, the server does not return log probabilities of
            a prompt of ids with the length of the longest window, or it has another tokenizer.
    """

    def __init__(self, server: ServerConfig, tokenizer: Tokenizer, description: ModelDescription) -> None:
        budget = server.requests * server.windows * description.longest_input_tokens
        super().__init__(tokenizer, description, budget, _ROUNDS_PER_SLICE)
        self._server, self._failures_in_a_row, self._logged = server, 0, -math.inf
        self._key, self._patience_seconds = _key(), min(_FIRST_PATIENCE_SECONDS, server.patience_seconds)
        self._client = self._make_client()
        self._loop, self._at_the_same_time = _started_loop(self), asyncio.Semaphore(server.requests)
        self._check(tokenizer)
        self._patience_seconds = server.patience_seconds

    def score_windows(self, jobs: list[WindowInput], texts: Slice) -> None:
        """Adds the nats of each window to the sum of its text; a window without a usable answer fails its text.

        Args:
            jobs: the windows of the slice.
            texts: the slice.

        Raises:
            ScoringError: the server gives no answer, refuses the key or the model, or fails for too many texts.
        """
        size = self._server.windows
        groups = [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]
        futures = {self._submit([jobs[number] for number in group], texts): group for group in groups}
        nats = np.zeros(len(jobs))
        try:
            for future in concurrent.futures.as_completed(futures):
                for number, answer in zip(futures[future], future.result(), strict=True):
                    nats[number] = self._read(jobs[number], answer, texts)
        finally:
            # After an error, or if `on_progress` raised: closes the connections of requests that still run.
            for future in futures:
                future.cancel()
        # In the order of the windows, whatever the order of the answers: a sum of floats depends on it.
        np.add.at(texts.sums, [job.text for job in jobs], nats)

    def _submit(
        self, group: list[WindowInput], texts: Slice
    ) -> "concurrent.futures.Future[list[_Answer | str | None]]":
        """Asks for windows, in another thread; None in place of an answer for those of a text that has failed."""

        async def run() -> list[_Answer | str | None]:
            async with self._at_the_same_time:
                asked = [texts.failures[job.text] is None for job in group]
                prompts = [_ids(job, texts) for job, is_asked in zip(group, asked, strict=True) if is_asked]
                answers = iter(await self._ask(prompts) if prompts else [])
            return [next(answers) if is_asked else None for is_asked in asked]

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def _read(self, job: WindowInput, answer: _Answer | str | None, texts: Slice) -> float:
        """The nats of a window; without a usable answer 0, and its text has failed."""
        n_scored, nats = 0, 0.0
        if isinstance(answer, str):
            self._fail(job, answer, texts)
        elif answer is not None:
            self._failures_in_a_row = 0
            scored = texts.input_of(job).scored[job.window.first_scored : job.window.end]
            # A value for each id but the first: those of the window's last targets stand at the end.
            nats = -float(answer.log_p[-len(scored) :][scored].sum(dtype=np.float64))
            n_scored = int(scored.sum())
        if self.on_progress is not None:
            self.on_progress(n_scored)
        return nats

    def _fail(self, job: WindowInput, problem: str, texts: Slice) -> None:
        if texts.failures[job.text] is not None:
            return
        texts.failures[job.text] = Failure("bad_answer", problem)
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            raise ScoringError(
                f"{self._where()}: {self._failures_in_a_row} texts in a row have no usable answer, the last: "
                f"{problem}; look at the server's log"
            )

    async def _ask(self, prompts: list[list[int]]) -> list[_Answer | str]:
        """The answer to each prompt, or what is wrong with it."""
        import openai

        try:
            return _answers(await self._complete(prompts), prompts)
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.APIResponseValidationError) as error:
            problem = self._text_of(error)
        except openai.APIStatusError as error:
            if error.status_code != _TOO_LARGE:
                raise self._refusal(error) from None
            problem = self._text_of(error)
        except openai.APIConnectionError as error:
            raise ScoringError(
                f"{self._where()}: no answer in {self._patience_seconds:g} s: {self._text_of(error)}"
            ) from None
        except ValueError as error:  # the answer is no JSON, or does not fit the request
            problem = self._text_of(error)
        if len(prompts) == 1:
            return [problem]
        # One of them may be the cause.
        return [found for prompt in prompts for found in await self._ask([prompt])]

    async def _complete(self, prompts: list[list[int]]) -> Any:
        """Sends a request; repeats it while the server is busy or away, for `_patience_seconds` in all."""
        from tenacity import AsyncRetrying, retry_if_exception, stop_before_delay

        tries = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            wait=_pause,
            stop=stop_before_delay(self._patience_seconds),
            before_sleep=self._log_repeated,
            reraise=True,
        )
        async for attempt in tries:
            with attempt:
                return await self._client.completions.create(
                    model=self._server.model, prompt=prompts, max_tokens=1, temperature=0.0, echo=True, logprobs=1
                )
        raise AssertionError("expected an answer or an error after the last try")

    def _log_repeated(self, state: Any) -> None:
        if time.monotonic() - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            LOGGER.warning(
                "%s: busy or away, asked again in %.1f s: %s",
                self._where(), state.upcoming_sleep, self._text_of(state.outcome.exception()),
            )  # fmt: skip

    def _refusal(self, error: Any) -> ScoringError:
        """The error that ends the scoring, for an answer with a status that says nothing about a text."""
        if error.status_code in (401, 403):
            return ScoringError(
                f"{self._where()}: the server refuses the key ({error.status_code}); set {KEY_VARIABLE} in the "
                "environment of the executors"
            )
        if error.status_code == 404:
            return ScoringError(
                f"{self._where()}: expected a completions endpoint with this model, found: {self._text_of(error)}"
            )
        wait = error.response.headers.get("retry-after")
        return ScoringError(
            f"{self._where()}: expected an answer, found status {error.status_code}"
            + (f" with the request to wait {wait} s" if wait else "")
            + (f" for {self._patience_seconds:g} s" if _may_pass(error) else "")
            + f": {self._text_of(error)}"
        )

    def _check(self, tokenizer: Tokenizer) -> None:
        """Sends a prompt of the greatest length, so that a server that cannot score is refused before any text."""
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids or [self.description.document_separator_id]
        n_ids = self.description.longest_input_tokens + 1
        prompt = (ids * (n_ids // len(ids) + 1))[:n_ids]
        try:
            (answer,) = asyncio.run_coroutine_threadsafe(self._ask([prompt]), self._loop).result()
        except ScoringError as error:
            raise ModelLoadError(str(error)) from error
        if isinstance(answer, str):
            raise ModelLoadError(
                f"{self._where()}: expected log probabilities of a prompt of {n_ids} token ids (echo and logprobs), as "
                f"vLLM returns them, found {answer}; if the prompt is too long, raise the server's longest input "
                f"(vLLM: --max-model-len {n_ids + 1}), or lower models.{self.description.model_id}.context_tokens"
            )
        for number, piece in zip(prompt, answer.pieces, strict=False):
            here = tokenizer.decode([number], skip_special_tokens=False)
            if not piece.startswith("token_id:") and _letters(piece) != _letters(here):
                raise ModelLoadError(
                    f"{self._where()}: expected a model with the tokenizer of models.{self.description.model_id}.path, "
                    f"found another: id {number} is {piece!r} there, and {here!r} here"
                )

    def _where(self) -> str:
        return f"models.{self.description.model_id}.server {storage.redact(self._server.url)}, {self._server.model}"

    def _text_of(self, error: Exception) -> str:
        """The error in one line, without the key, which a server may repeat."""
        text = f"{type(error).__name__}: {first_line(error)}"
        # Before the text is cut, which could leave a part of the key.
        return (text if self._key is None else text.replace(self._key, "(hidden)"))[:500]

    def _make_client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ModelLoadError("backend: openai needs the package openai: pip install 'miniplm[server]'") from error
        seconds = self._server.timeout_seconds
        return openai.AsyncOpenAI(
            base_url=self._server.url,
            # The library demands a key; servers without one ignore it.
            api_key=self._key or "none",
            timeout=openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            max_retries=0,  # the library counts tries, whose answers may each take `timeout_seconds`
        )


def _key() -> str | None:
    """The key in the environment; None if there is none.

    Raises:
        ModelLoadError: it has characters that an HTTP header cannot have.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise ModelLoadError(f"{KEY_VARIABLE}: expected printable ASCII characters, found others; set it again")
    return key or None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may get an answer later: the server is away, busy, or fails."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _pause(state: Any) -> float:
    """Seconds before the next try: growing, or what the server asks for."""
    from tenacity import wait_exponential_jitter

    growing = wait_exponential_jitter(initial=0.5, max=_LONGEST_PAUSE_SECONDS, jitter=0.25)(state)
    response = getattr(state.outcome.exception(), "response", None)
    asked = "" if response is None else response.headers.get("retry-after", "")
    return max(growing, float(asked)) if asked.replace(".", "", 1).isdigit() else growing


def _started_loop(owner: object) -> asyncio.AbstractEventLoop:
    """An event loop that runs in a thread of its own until `owner` is deleted."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        loop.run_forever()
        loop.close()

    threading.Thread(target=run, name="requests", daemon=True).start()
    weakref.finalize(owner, loop.call_soon_threadsafe, loop.stop).atexit = False
    return loop


def _ids(job: WindowInput, texts: Slice) -> list[int]:
    """The ids of a window with the target of its last prediction."""
    item = texts.input_of(job)
    return [*job.in_front, *map(int, item.ids[job.window.start : job.window.end + 1])]


def _letters(piece: str) -> str:
    """The letters and digits of a token's text: libraries write spaces and special tokens in different ways."""
    return "".join(character for character in piece if character.isalnum())


def _answers(answer: Any, prompts: Sequence[Sequence[int]]) -> list[_Answer | str]:
    """The answer to each prompt, or what is wrong with it.

    Raises:
        ValueError: the answer as a whole does not fit the request.
    """
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or len(choices) != len(prompts):
        found = len(choices) if isinstance(choices, list) else choices
        raise ValueError(f"expected {len(prompts)} choices, found {found}")
    by_index = {getattr(choice, "index", None): choice for choice in choices}
    if set(by_index) != set(range(len(prompts))):
        raise ValueError(f"expected choices with the indices 0 to {len(prompts) - 1}, found {list(by_index)}")
    return [_of_prompt(by_index[number], prompt) for number, prompt in enumerate(prompts)]


def _of_prompt(choice: Any, prompt: Sequence[int]) -> _Answer | str:
    logprobs = getattr(choice, "logprobs", None)
    values = getattr(logprobs, "token_logprobs", None)
    # The prompt's ids, and at most the generated token.
    if not isinstance(values, list) or not len(prompt) <= len(values) <= len(prompt) + 1:
        n = len(values) if isinstance(values, list) else "none"
        return f"expected log probabilities of {len(prompt)} ids, found {n}"
    of_ids = values[1 : len(prompt)]
    if not all(isinstance(value, int | float) and value <= 1e-6 for value in of_ids):
        return "expected a log probability of at most 0 for each id after the first, found others"
    log_p = np.array([value if value > _MINUS_INFINITY else -math.inf for value in of_ids], dtype=np.float64)
    return _Answer(log_p, [str(piece) for piece in getattr(logprobs, "tokens", None) or []])
