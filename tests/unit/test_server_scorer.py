"""Scores from a server equal the local scorer's; without a usable answer they are refused or rejected."""

import logging
import pickle
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.stage_inputs import ingest_inputs, score_inputs
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig, ServerConfig
from miniplm_udf.errors import ConfigError, ModelLoadError, ScoringError
from miniplm_udf.scoring.description import settled_dtype
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support.completions_server import MODEL, CompletionsServer, Response
from tests.support.scoring_oracles import ROWS, brute_force, plain_model, plain_tokenizer, score
from tests.support.tiny_models import make_bos_folder, make_model_folder

NATS_PER_TOKEN = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(folder: Path) -> Iterator[CompletionsServer]:
    with CompletionsServer(plain_model(folder), plain_tokenizer(folder)) as running:
        yield running


def config_of(path: Path, url: str, **server: Any) -> ModelConfig:
    settings = {"model": MODEL, "requests": 2, "windows": 2, "patience_seconds": 5.0, "timeout_seconds": 20.0} | server
    return ModelConfig(
        path=str(path), backend="openai", server=ServerConfig(url=url, **settings), context_tokens=24,
        window_overlap_tokens=6,
    )  # fmt: skip


def scorer_of(config: ModelConfig) -> Any:
    return ModelScorerFactory(config, describe("teacher", config), ScoreConfig())()


def test_a_server_scores_as_the_loop_of_single_prefixes(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url))
    tokens: list[int] = []
    scorer.on_progress = tokens.append
    found = score(scorer, ROWS)
    for row, result in zip(ROWS, found, strict=True):
        expected = brute_force(plain_model(folder), plain_tokenizer(folder), row)
        if expected.n_tokens == 0:
            assert result.reason == "no_tokens"
            continue
        assert (result.n_tokens, result.n_bytes) == (expected.n_tokens, expected.n_bytes), row
        assert result.nll_sum_nats == pytest.approx(expected.nll_sum_nats, abs=NATS_PER_TOKEN * expected.n_tokens)
    assert sum(tokens) == sum(result.n_tokens for result in found if isinstance(result, Score))
    sizes = [len(request["prompt"]) for request in server.requests]
    assert max(sizes) == 2
    # A window, and the target of its last prediction.
    assert max(len(ids) for request in server.requests for ids in request["prompt"]) == 24 + 1


def test_the_bos_stands_in_front_of_every_window_on_the_server_too(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    with CompletionsServer(plain_model(folder)) as server:
        scorer = scorer_of(config_of(folder, server.url))
        assert scorer.description.bos_token_id is not None
        score(scorer, ROWS[:2])
        prompts = [ids for request in server.requests[1:] for ids in request["prompt"]]
        assert {ids[0] for ids in prompts} == {scorer.description.bos_token_id}


def test_the_revision_is_the_servers_and_not_that_of_the_files(folder: Path, server: CompletionsServer) -> None:
    local = describe("teacher", ModelConfig(path=str(folder), context_tokens=24, window_overlap_tokens=6))
    served = describe("teacher", config_of(folder, server.url))
    elsewhere = describe("teacher", config_of(folder, "http://elsewhere/v1"))
    updated = describe("teacher", config_of(folder, server.url, revision="2"))
    assert served.model_revision == elsewhere.model_revision
    assert len({each.model_revision for each in (local, served, updated)}) == 3
    assert served.dtype == "server"
    assert updated.path == f"{folder}, served as {MODEL}@2"
    assert settled_dtype(served.to_dict()) is None
    assert settled_dtype(local.to_dict()) == "float32"
    assert served.n_parameters == sum(weight.numel() for weight in plain_model(folder).parameters())


def test_a_folder_without_weights_is_enough(folder: Path, tmp_path: Path, server: CompletionsServer) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert isinstance(score(scorer_of(config_of(tmp_path, server.url)), ROWS[:1])[0], Score)
    with pytest.raises(ModelLoadError, match=r"weights|safetensors"):
        describe("teacher", ModelConfig(path=str(tmp_path)))


def test_a_busy_server_is_asked_again(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url))
    n_before = len(server.requests)
    server.faults.extend([lambda *_: (429, {"Retry-After": "0"}, {}), lambda *_: (503, {"Retry-After": "0"}, {})])
    assert isinstance(score(scorer, ROWS[:1])[0], Score)
    assert len(server.requests) == n_before + 3


@pytest.mark.parametrize("patience", [0, 1.5])
def test_a_server_that_stays_away_stops_the_scoring(folder: Path, server: CompletionsServer, patience: float) -> None:
    scorer = scorer_of(config_of(folder, server.url, patience_seconds=patience))
    n_before = len(server.requests)
    server.faults.extend([lambda *_: (0, {}, {})] * 50)
    with pytest.raises(ScoringError, match=rf"models\.teacher\.server http.*no answer in {patience} s: APIConnection"):
        score(scorer, ROWS[:1])
    assert (len(server.requests) - n_before > 1) == (patience > 0)


def test_a_lost_connection_is_repeated_with_a_line_in_the_log(
    folder: Path, server: CompletionsServer, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = scorer_of(config_of(folder, server.url))
    server.faults.append(lambda *_: (0, {}, {}))
    assert isinstance(score(scorer, ROWS[:1])[0], Score)
    assert "busy or away, asked again in" in caplog.text


def test_a_late_answer_is_asked_for_again_and_then_ends_the_scoring(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url))
    scorer._client = scorer._client.with_options(timeout=0.3)
    server.faults.append(lambda *_: time.sleep(1))
    assert isinstance(score(scorer, ROWS[:1])[0], Score)
    scorer._patience_seconds = 1.0
    server.faults.extend([lambda *_: time.sleep(1)] * 10)
    with pytest.raises(ScoringError, match=r"no answer in 1 s: APITimeoutError"):
        score(scorer, ROWS[:1])


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (405, {}, r"found status 405: "),
        (503, {"Retry-After": "300"}, r"found status 503 with the request to wait 300 s for 5 s: "),
        (403, {}, r"refuses the key \(403\)"),
    ],
)
def test_a_status_that_says_nothing_of_a_text_ends_the_scoring(
    folder: Path, server: CompletionsServer, status: int, headers: dict[str, str], message: str
) -> None:
    scorer = scorer_of(config_of(folder, server.url))
    n_before = len(server.requests)
    server.faults.append(lambda *_: (status, headers, {"error": {"message": "no"}}))
    with pytest.raises(ScoringError, match=message):
        score(scorer, ROWS[:1])
    assert len(server.requests) == n_before + 1


def test_an_error_ends_the_requests_that_still_run(folder: Path, server: CompletionsServer) -> None:
    """`on_progress` raises when the worker has gone; the other requests must not hold up the next task."""
    scorer = scorer_of(config_of(folder, server.url, requests=2, windows=1, timeout_seconds=120.0))
    started, released, ended = threading.Semaphore(0), threading.Event(), []

    def hold(*_: Any) -> None:
        started.release()
        released.wait(10)
        ended.append(True)

    def gone(_: int) -> None:
        for _ in range(2):
            started.acquire()
        raise ConnectionResetError("the worker has gone")

    scorer.on_progress = gone
    server.faults.extend([lambda *_: None, hold, hold])
    try:
        with pytest.raises(ConnectionResetError):
            score(scorer, [ROWS[0], ROWS[4], ROWS[0]])
        scorer.on_progress = None
        # Both requests at the same time were held: this one waits for the end of one of them, if nothing cancels them.
        assert isinstance(score(scorer, ROWS[:1])[0], Score)
        assert not ended
    finally:
        released.set()


def _short(request: dict[str, Any], answer: Any) -> Response:
    for choice in answer["choices"]:
        del choice["logprobs"]["token_logprobs"][-2:]
    return 200, {}, answer


def _without_logprobs(request: dict[str, Any], answer: Any) -> Response:
    return 200, {}, answer | {"choices": [choice | {"logprobs": None} for choice in answer["choices"]]}


def _null(request: dict[str, Any], answer: Any) -> Response:
    answer["choices"][0]["logprobs"]["token_logprobs"][1] = None
    return 200, {}, answer


def _fewer(request: dict[str, Any], answer: Any) -> Response:
    return 200, {}, answer | {"choices": []}


def _refused(request: dict[str, Any], answer: Any) -> Response:
    return 400, {}, {"error": {"message": "too long"}}


def _positive(request: dict[str, Any], answer: Any) -> Response:
    answer["choices"][0]["logprobs"]["token_logprobs"][1] = 3
    return 200, {}, answer


def _no_index(request: dict[str, Any], answer: Any) -> Response:
    return 200, {}, answer | {"choices": [choice | {"index": None} for choice in answer["choices"]]}


def _null_choice(request: dict[str, Any], answer: Any) -> Response:
    return 200, {}, answer | {"choices": [None for _ in answer["choices"]]}


def _number(request: dict[str, Any], answer: Any) -> Response:
    answer["choices"][0]["logprobs"]["token_logprobs"] = 7
    return 200, {}, answer


BAD = {
    "positive": (_positive, "at most 0 for each id"),
    "no index": (_no_index, r"indices 0 to 0, found \[None\]"),
    "null choice": (_null_choice, r"indices 0 to 0, found \[None\]"),
    "number": (_number, r"expected log probabilities of \d+ ids, found none"),
    "broken JSON": (lambda *_: (200, {}, "{"), "JSONDecodeError|APIResponseValidationError"),
    "too large": (lambda *_: (413, {}, {"error": {"message": "body"}}), "body"),
    "short": (_short, r"expected log probabilities of \d+ ids"),
    "without": (_without_logprobs, "found none"),
    "null": (_null, "at most 0 for each id"),
    "fewer": (_fewer, "expected 1 choices, found 0"),
    "no JSON": (lambda *_: (200, {"Content-Type": "text/html"}, "<html>"), "expected 1 choices, found None"),
    "refused": (_refused, "BadRequestError.*too long"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_rejects_its_text_alone(folder: Path, server: CompletionsServer, kind: str) -> None:
    fault, message = BAD[kind]
    scorer = scorer_of(config_of(folder, server.url, requests=1, windows=1))
    server.faults.append(fault)
    first, second = score(scorer, [ROWS[0], ROWS[4]])
    assert isinstance(first, Failure)
    assert first.reason == "bad_answer"
    assert re.search(message, first.detail)
    assert isinstance(second, Score)


def test_one_bad_window_of_a_request_rejects_one_text(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url, requests=1, windows=2))
    server.faults.extend([_refused, _refused])  # the request of two windows, then the first alone
    first, second = score(scorer, [ROWS[0], ROWS[4]])
    assert isinstance(first, Failure)
    assert isinstance(second, Score)


def test_a_server_that_answers_nothing_usable_stops_the_scoring(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url, windows=1))
    server.faults.extend([_short] * 100)
    with pytest.raises(ScoringError, match=r"32 texts in a row .* look at the server's log"):
        score(scorer, [ROWS[0]] * 40)


def test_the_windows_of_a_failed_text_are_not_sent(folder: Path, server: CompletionsServer) -> None:
    scorer = scorer_of(config_of(folder, server.url, requests=1, windows=1))
    n_before = len(server.requests)
    server.faults.append(_short)
    long_text = (" ".join(["word"] * 2000), [], True)
    failed, scored = score(scorer, [long_text, ROWS[4]])
    assert isinstance(failed, Failure)
    assert isinstance(scored, Score)
    # The text has hundreds of windows; a few are sent before the first answer is read.
    assert len(server.requests) - n_before < 50


def test_minus_infinity_rejects_the_text(folder: Path, server: CompletionsServer) -> None:
    def impossible(request: dict[str, Any], answer: Any) -> Response:
        answer["choices"][0]["logprobs"]["token_logprobs"][1] = -9999.0
        return 200, {}, answer

    scorer = scorer_of(config_of(folder, server.url, requests=1, windows=1))
    server.faults.append(impossible)
    failed = score(scorer, ROWS[:1])[0]
    assert isinstance(failed, Failure)
    assert failed.reason == "nan_score"


@pytest.mark.parametrize("fault", [_without_logprobs, _short, _refused])
def test_a_server_that_cannot_score_is_refused_at_its_start(
    folder: Path, server: CompletionsServer, fault: Any
) -> None:
    server.faults.append(fault)
    with pytest.raises(ModelLoadError, match=r"models\.teacher\.server .*expected log probabilities of a prompt"):
        scorer_of(config_of(folder, server.url))


def test_a_server_with_a_shorter_longest_input_is_refused_at_its_start(folder: Path) -> None:
    # A window of 24 tokens, the target of its last prediction, and the generated token.
    too_short = pytest.raises(ModelLoadError, match=r"longest input has 25 tokens.*--max-model-len 26")
    with CompletionsServer(plain_model(folder), longest=25) as server, too_short:
        scorer_of(config_of(folder, server.url))
    with CompletionsServer(plain_model(folder), longest=26) as server:
        scorer_of(config_of(folder, server.url))


def test_a_server_with_another_tokenizer_is_refused_at_its_start(folder: Path) -> None:
    class Other:
        def decode(self, ids: list[int]) -> str:
            return f"word{ids[0]}"

    refused = pytest.raises(ModelLoadError, match=r"with the tokenizer .*found another: id \d+ is 'word")
    with CompletionsServer(plain_model(folder), Other()) as server, refused:
        scorer_of(config_of(folder, server.url))


def test_another_model_name_or_no_server_is_refused_at_its_start(folder: Path, server: CompletionsServer) -> None:
    with pytest.raises(ModelLoadError, match=r"expected a completions endpoint with this model, found: .*other"):
        scorer_of(config_of(folder, server.url, model="other"))
    with pytest.raises(ModelLoadError, match="no answer in 0 s"):
        scorer_of(config_of(folder, "http://127.0.0.1:9/v1", patience_seconds=0))


def test_the_key_comes_from_the_environment_and_is_never_shown(
    folder: Path, server: CompletionsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " secret-key\n")
    config = config_of(folder, server.url)
    with caplog.at_level(logging.DEBUG):
        scorer = scorer_of(config)
        server.faults.append(lambda *_: (401, {}, {"error": {"message": "Incorrect key: secret-key"}}))
        with pytest.raises(ScoringError, match=r"refuses the key.*OPENAI_API_KEY") as refused:
            score(scorer, ROWS[:1])
        # The error is cut, and the cut may fall into the key.
        said = [" " * n + "You sent: Bearer secret-key" for n in (0, *range(430, 490, 3))]
        for text in said:
            server.faults.append(lambda *_, text=text: (400, {}, {"error": {"message": text}}))
        rejected = [score(scorer, ROWS[:1])[0].detail for _ in said]
    assert "Bearer (hidden)" in rejected[0]
    assert not any("secret" in detail for detail in rejected)
    assert set(server.keys) == {"Bearer secret-key"}
    factory = ModelScorerFactory(config, scorer.description, ScoreConfig())
    assert "secret-key" not in str(refused.value) + caplog.text
    assert b"secret-key" not in pickle.dumps(factory)


def test_a_key_that_no_header_can_have_is_refused(
    folder: Path, server: CompletionsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(ModelLoadError, match="OPENAI_API_KEY: expected printable ASCII") as refused:
        scorer_of(config_of(folder, server.url))
    assert "schl" not in str(refused.value)


def test_two_servers_need_two_names(tmp_path: Path) -> None:
    def config(**second: str) -> ExperimentConfig:
        urls = {"teacher": {"url": "http://x/v1"}, "reference": {"url": "http://y/v1"} | second}
        models = {
            alias: ModelConfig(path="x", backend="openai", server=ServerConfig(model="m", **settings))
            for alias, settings in urls.items()
        }
        return ExperimentConfig(root=str(tmp_path), models=models)

    with pytest.raises(
        ConfigError, match=r"models\.reference\.server\.revision: expected another than models\.teacher"
    ):
        config()
    config(revision="other weights")
    config(url="http://x/v1")  # the same server, perhaps with other windows


def test_where_a_model_runs_and_how_its_server_is_asked_runs_no_stage_again(tmp_path: Path) -> None:
    def inputs(**settings: Any) -> list[Any]:
        server = ServerConfig(**{"url": "http://x/v1", "model": "m"} | settings)
        models = {"teacher": ModelConfig(path="x", backend="openai", server=server)}
        return score_inputs(ExperimentConfig(root=str(tmp_path), models=models))

    assert inputs() == inputs(requests=1, windows=1, patience_seconds=0.0, timeout_seconds=1.0, url="http://y/v1")
    assert inputs() != inputs(revision="2")
    local = score_inputs(ExperimentConfig(root=str(tmp_path), models={"teacher": ModelConfig(path="x")}))
    assert "server" not in local[0]["teacher"]
    # The tokenizer that cuts the text is the same, wherever the model runs.
    place = ServerConfig(url="http://x/v1", model="m")
    first, second = (
        ingest_inputs(ExperimentConfig(root=str(tmp_path), models={"teacher": model}))
        for model in (ModelConfig(path="x"), ModelConfig(path="x", backend="openai", server=place))
    )
    assert first == second
    assert "backend" not in local[0]["teacher"]
    split = ModelConfig(path="x", device_map="auto")
    assert score_inputs(ExperimentConfig(root=str(tmp_path), models={"teacher": split})) == local


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.teacher.backend=openai", "server: expected together with `backend: openai`"),
        ("models.teacher.server={url: 'http://x/v1', model: m}", "server: expected together with `backend: openai`"),
        ("models.teacher={path: x, backend: openai, server: {url: 'x/v1', model: m}}", r"server\.url: expected http"),
        (
            "models.teacher={path: x, backend: openai, server: {url: 'http://me:secret@x/v1', model: m}}",
            r"server\.url: expected no user, password, query or fragment, (?!.*secret)",
        ),
        (
            "models.teacher={path: x, backend: openai, server: {url: 'http://x/v1?key=secret', model: m}}",
            r"server\.url: expected no user, password, query or fragment, (?!.*secret)",
        ),
        (
            "models.teacher={path: x, backend: openai, server: {url: 'http://x:80abc/v1', model: m}}",
            r"server\.url: expected http",
        ),
        (
            "models.teacher={path: x.gguf, backend: openai, server: {url: 'http://x/v1', model: m}}",
            r"path: expected a folder or hub name .*found x\.gguf",
        ),
        (
            "models.teacher={path: x, backend: openai, dtype: bfloat16, server: {url: 'http://x/v1', model: m}}",
            r"dtype: expected auto with `backend: openai`",
        ),
        (
            "models.teacher={path: x, backend: openai, server: {url: 'http://x/v1', model: m, windows: 0}}",
            r"server\.windows: expected at least 1",
        ),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, override: str, message: str) -> None:
    conf = Path(__file__).resolve().parents[2] / "conf/demo.yaml"
    with pytest.raises(ConfigError, match=message):
        load_config(conf, [f"root={tmp_path}", override])


def test_a_server_only_scores(tmp_path: Path) -> None:
    served = ModelConfig(path="x", backend="openai", server=ServerConfig(url="http://x/v1", model="m"))
    with pytest.raises(ConfigError, match=r"generate\.model: expected a model with `backend: local`"):
        ExperimentConfig(root=str(tmp_path), models={"teacher": served}, generate=GenerateConfig(model="teacher"))
