"""Scores texts through a server with OpenAI's completions endpoint that returns log probabilities of the prompt.

Input: the windows of a slice of texts; output: their nats. A window is sent as token ids, so the server's tokenizer
plays no part, and comes back with the log probability of each id after the first. vLLM and SGLang answer so. Several
requests run at the same time; the client library repeats a request that found the server busy or away. An answer that
does not fit its request fails the texts of that request, and after 32 of them in a row the scoring. The key comes from
the environment variable OPENAI_API_KEY alone. Executor side; loads no torch. A retry asks again.
"""

import concurrent.futures
import logging
import math
import os
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
# After this many windows in a row without a usable answer, the server is the cause and not the texts.
_MAX_FAILURES_IN_A_ROW = 32
# vLLM writes this in place of minus infinity, which JSON does not have.
_MINUS_INFINITY = -9999.0


class ServerScorer(TextScorer):
    """A model on a server that scores texts; `tokens_per_batch` is what all requests at the same time may hold.

    Args:
        server: the server.
        tokenizer: the model's tokenizer (`load_tokenizer`).
        description: the model's description.

    Raises:
        ModelLoadError: the library is missing, or the server does not return log probabilities of a prompt of ids.
    """

    def __init__(self, server: ServerConfig, tokenizer: Tokenizer, description: ModelDescription) -> None:
        super().__init__(tokenizer, description, server.requests * server.windows * description.longest_input_tokens)
        self._server = server
        self._client = _client(server)
        self._failures_in_a_row = 0
        self._check(description)

    def score_windows(self, jobs: list[WindowInput], texts: Slice) -> None:
        """Adds the nats of each window to the sum of its text; a window without a usable answer fails its text.

        Args:
            jobs: the windows of the slice.
            texts: the slice.

        Raises:
            ScoringError: the server gives no answer, refuses the key or the model, or fails for too many windows.
        """
        size = self._server.windows
        groups = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        with concurrent.futures.ThreadPoolExecutor(self._server.requests) as pool:
            futures = [pool.submit(self._ask, [_ids(job, texts) for job in group]) for group in groups]
            try:
                for group, future in zip(groups, futures, strict=True):
                    self._add(group, future.result(), texts)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _add(self, group: list[WindowInput], answers: Sequence[np.ndarray | str], texts: Slice) -> None:
        """Adds the answers to one request to the sums of their texts."""
        n_scored = 0
        for job, answer in zip(group, answers, strict=True):
            if isinstance(answer, str):
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                    raise ScoringError(
                        f"{self._where()}: {self._failures_in_a_row} windows in a row have no usable answer, the last: "
                        f"{answer}; look at the server's log"
                    )
                texts.failures[job.text] = Failure("bad_answer", answer)
                continue
            self._failures_in_a_row = 0
            item, window = texts.input_of(job), job.window
            scored = item.scored[window.first_scored : window.end]
            # A value for each id but the first: those of the window's last targets stand at the end.
            texts.sums[job.text] -= float(answer[-len(scored) :][scored].sum(dtype=np.float64))
            n_scored += int(scored.sum())
        if self.on_progress is not None:
            self.on_progress(n_scored)

    def _ask(self, prompts: list[list[int]]) -> list[np.ndarray | str]:
        """The log probabilities of each prompt's ids but the first, or what is wrong with the answer."""
        import openai

        try:
            answer = self._client.completions.create(
                model=self._server.model, prompt=prompts, max_tokens=1, temperature=0.0, echo=True, logprobs=1
            )
            return _log_probabilities(answer, prompts)
        except (openai.BadRequestError, openai.UnprocessableEntityError, ValueError) as error:
            if len(prompts) > 1:  # one of them may be the cause
                return [found for prompt in prompts for found in self._ask([prompt])]
            return [f"{type(error).__name__}: {first_line(error)[:500]}"]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ScoringError(
                f"{self._where()}: the server refuses the key ({error.status_code}); set {KEY_VARIABLE} in the "
                "environment of the executors"
            ) from None
        except openai.NotFoundError as error:
            raise ScoringError(
                f"{self._where()}: expected a completions endpoint with this model, found: {first_line(error)[:500]}"
            ) from error
        except openai.OpenAIError as error:
            raise ScoringError(
                f"{self._where()}: no answer after {self._server.retries + 1} tries of at most "
                f"{self._server.timeout_seconds:g} s: {type(error).__name__}: {first_line(error)[:500]}"
            ) from error

    def _check(self, description: ModelDescription) -> None:
        """Asks for a short prompt, so that a server that cannot score is refused before any text is sent."""
        ids = [description.document_separator_id] * 3
        try:
            (found,) = self._ask([ids])
        except ScoringError as error:
            raise ModelLoadError(str(error)) from error
        if isinstance(found, str):
            raise ModelLoadError(
                f"{self._where()}: expected log probabilities of a prompt of token ids (echo and logprobs), as vLLM "
                f"and SGLang return them, found {found}"
            )

    def _where(self) -> str:
        return f"models.{self.description.model_id}.server {storage.redact(self._server.url)}, {self._server.model}"


def _client(server: ServerConfig) -> Any:
    try:
        import openai
    except ImportError as error:
        raise ModelLoadError("backend: openai needs the package openai: pip install 'miniplm[server]'") from error
    # Its own log would have a line for each request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return openai.OpenAI(
        base_url=server.url,
        # The library demands a key; servers without one ignore it.
        api_key=os.environ.get(KEY_VARIABLE) or "none",
        timeout=server.timeout_seconds,
        max_retries=server.retries,
    )


def _ids(job: WindowInput, texts: Slice) -> list[int]:
    """The ids of a window with the target of its last prediction."""
    item = texts.input_of(job)
    return [*job.in_front, *map(int, item.ids[job.window.start : job.window.end + 1])]


def _log_probabilities(answer: Any, prompts: Sequence[Sequence[int]]) -> list[np.ndarray | str]:
    """The log probabilities of each prompt's ids but the first, or what is wrong with them.

    Raises:
        ValueError: the answer as a whole does not fit the request.
    """
    choices = getattr(answer, "choices", None)
    if choices is None or len(choices) != len(prompts):
        raise ValueError(f"expected {len(prompts)} choices, found {None if choices is None else len(choices)}")
    by_prompt = sorted(choices, key=lambda choice: int(choice.index))
    return [_of_prompt(choice, prompt) for choice, prompt in zip(by_prompt, prompts, strict=True)]


def _of_prompt(choice: Any, prompt: Sequence[int]) -> np.ndarray | str:
    values = getattr(choice.logprobs, "token_logprobs", None)
    # The prompt's ids, and at most the generated token.
    if values is None or not len(prompt) <= len(values) <= len(prompt) + 1:
        n = "none" if values is None else len(values)
        return f"expected log probabilities of {len(prompt)} ids, found {n}"
    of_ids = values[1 : len(prompt)]
    if not all(isinstance(value, int | float) and value <= 1e-6 for value in of_ids):
        return "expected a log probability of at most 0 for each id after the first, found others"
    return np.array([value if value > _MINUS_INFINITY else -math.inf for value in of_ids], dtype=np.float64)
