"""Compilation in the background: scores stay equal, all layers share the code, nothing that fails in it stops scoring.

Most tests give torch a compiler that returns the traced graph, which takes no time: what torch traces, when it compiles
again and which code runs are the same. The tests with torch's own compiler are slow.
"""

import functools
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from miniplm_udf.scoring import compilation
from miniplm_udf.scoring.attention import improve_attention
from miniplm_udf.scoring.compiler_settings import limit_processes, use_disk_cache
from miniplm_udf.scoring.head import Head
from miniplm_udf.scoring.results import Score
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, Row, score
from tests.support.tiny_models import make_model_folder, make_scorer

# Rows and tokens: mixed lengths, one row, one token, and both.
SHAPES = [(3, 9), (2, 5), (4, 20), (2, 70), (1, 8), (1, 50), (6, 2)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
            patch.setenv(name, "")  # the patch restores them, whatever a test sets
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def nothing_compiles() -> Iterator[None]:
    yield
    compilation.finish_compiling()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("llama"), "llama")


def traced(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A compiler that returns the traced graph."""
    return graph.forward


def compiled_scorer(folder: Path, backend: Any, tokens_per_batch: int = 64, **changes: Any) -> Any:
    scorer = make_scorer(folder, tokens_per_batch, compiled=False, **changes)
    scorer._head.compile(backend)
    return scorer


def functions(scorer: Any) -> list[compilation.CompiledFunction]:
    return [*scorer._head._layers._functions, scorer._head._tile_nll]


def runs(scorer: Any) -> list[int]:
    """How often compiled code has run: of each class of layers, then of the head."""
    return [function._runs for function in functions(scorer)]


def score_compiled(scorer: Any, rows: list[Row]) -> list[Any]:
    """Scores until nothing is left to compile."""
    for _ in range(20):
        scores = score(scorer, rows)
        if not scorer.finish_compiling():
            return scores
    raise AssertionError("every batch begins a compilation")


def check_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Score), one
        assert one.nll_sum_nats == pytest.approx(other.nll_sum_nats, abs=1e-5 * one.n_tokens)
        assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)


# --- how much is compiled ---


def compilations(family: str, n_layers: int) -> int:
    """Compiles a model for SHAPES, compares it with the eager model, and returns how often torch compiled a layer."""
    model = tiny_models.make_model(family, num_hidden_layers=n_layers).requires_grad_(False)
    improve_attention(model)
    counter = CompileCounter()
    head = Head(model)
    inputs = [torch.arange(rows * tokens).view(rows, tokens) * 31 % 320 for rows, tokens in SHAPES]
    with torch.inference_mode():
        expected = [head.hidden(input_BT) for input_BT in inputs]
        head.compile(counter)
        assert isinstance(head._layers, compilation.CompiledLayers)
        while True:
            hidden = [head.hidden(input_BT) for input_BT in inputs]
            if not compilation.finish_compiling():
                break
    for one, other in zip(hidden, expected, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 1e-5
    # All layers of the last pass over all inputs ran compiled.
    before = sum(function._runs for function in head._layers._functions)
    with torch.inference_mode():
        for input_BT in inputs:
            head.hidden(input_BT)
    assert sum(function._runs for function in head._layers._functions) - before == n_layers * len(SHAPES)
    return int(counter.frame_count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variants"),
    [
        # For several rows and for one.
        ("llama", 2),
        ("qwen2", 2),
        ("gpt2", 2),
        ("mixtral", 2),
        pytest.param("qwen3_moe", 2, marks=pytest.mark.long),
        # A short input, of several rows in SHAPES, needs no mask; a long one has the mask of the sliding window.
        pytest.param("mistral", 3, marks=pytest.mark.long),
        # Two kinds of layers: with and without experts, with and without rotary positions (every fourth).
        pytest.param("deepseek_v3", 4, marks=pytest.mark.long),
        pytest.param("smollm3", 4, marks=pytest.mark.long),
        # Masks and kinds of layers together, and attention next to a state space.
        ("gemma2", None),
        pytest.param("gemma3_text", None, marks=pytest.mark.long),
        pytest.param("olmo3", None, marks=pytest.mark.long),
        pytest.param("falcon_h1", None, marks=pytest.mark.long),
    ],
)
def test_equal_layers_share_the_code(family: str, variants: int | None) -> None:
    n_layers = 6 if family == "gemma3_text" else 4  # every sixth layer has no sliding window
    few, many = compilations(family, n_layers), compilations(family, 2 * n_layers)
    assert few == many <= compilation._MOST_VARIANTS
    assert variants in (None, few)


def test_mixed_lengths_need_no_other_code(llama: Path) -> None:
    """Two variants of a layer, for several rows and for one, and one of the head."""
    counter = CompileCounter()
    scorer = compiled_scorer(llama, counter)
    rows = [(text * repeats, [], True) for text, _, _ in ROWS for repeats in (1, 2, 5)]
    check_equal(score_compiled(scorer, rows), score(make_scorer(llama), rows))
    assert 2 <= counter.frame_count <= 3
    assert min(runs(scorer)) > 0
    before = counter.frame_count
    score_compiled(scorer, [(f"{'word ' * n}", [], True) for n in range(1, 40)])
    assert counter.frame_count == before


def _summed(value_BT: torch.Tensor) -> torch.Tensor:
    total_B = value_BT[:, 0]
    for position in range(1, value_BT.shape[1]):
        total_B = total_B + value_BT[:, position]
    return total_B


def test_code_for_one_length_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """torch unrolls a loop over the tokens, for one number of tokens."""
    function = compilation.CompiledFunction(_summed, "summed", traced)
    for n_tokens in (5, 5, 6):
        assert function(torch.ones(3, n_tokens)).equal(torch.full((3,), float(n_tokens)))
        compilation.finish_compiling()
    assert function._runs == 0
    assert caplog.text.count("summed: runs without compilation, which is slower") == 1
    assert "its code depends on the number of rows or tokens" in caplog.text


# --- scores ---


@pytest.mark.parametrize("changes", [{}, {"context_prefix": "token"}, {"context_tokens": 100}])
def test_scores_are_equal(llama: Path, changes: dict[str, Any]) -> None:
    scorer = compiled_scorer(llama, traced, **changes)
    check_equal(score_compiled(scorer, ROWS), score(make_scorer(llama, **changes), ROWS))
    assert all(count > 0 for count in runs(scorer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "qwen2",
        "gemma2",
        "gemma3_text",
        "mixtral",
        pytest.param("mamba", marks=pytest.mark.long),
        pytest.param("falcon_h1", marks=pytest.mark.long),
    ],
)
def test_scores_of_other_families_are_equal(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path, family)
    scorer = compiled_scorer(folder, traced)
    check_equal(score_compiled(scorer, ROWS), score(make_scorer(folder), ROWS))
    assert all(count > 0 for count in runs(scorer))


@pytest.mark.slow
def test_a_bos_is_in_front_of_compiled_windows(tmp_path: Path) -> None:
    folder = tiny_models.make_bos_folder(tmp_path, "gemma2", "add_bos_token")
    scorer = compiled_scorer(folder, traced)
    assert scorer.description.bos_token_id == tiny_models.BOS_ID
    check_equal(score_compiled(scorer, ROWS), score(make_scorer(folder), ROWS))


def test_it_scores_while_it_compiles(llama: Path) -> None:
    """The compiler waits for the third batch: the batches before are eager, and later ones are compiled."""
    may_end, eager_batches = threading.Event(), []

    def slow(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert may_end.wait(60)
        return graph.forward

    def progressed(n_tokens: int) -> None:
        if not may_end.is_set():
            assert [thread.name for thread in threading.enumerate()].count("compile") == 1
            assert runs(scorer) == [0, 0]
            eager_batches.append(n_tokens)
        if len(eager_batches) == 3:
            may_end.set()
            scorer.finish_compiling()

    rows = [*ROWS[:5], *ROWS[3:4] * 4]
    expected = score(make_scorer(llama), rows)
    scorer = compiled_scorer(llama, slow)
    scorer.on_progress = progressed
    try:
        check_equal(score(scorer, rows), expected)
    finally:
        may_end.set()
    assert len(eager_batches) == 3
    assert runs(scorer)[0] > 0


def test_modules_may_be_called_while_another_thread_traces() -> None:
    """torch's own tracer replaces `Module.__call__` for all threads."""
    is_tracing, may_end, layer = threading.Event(), threading.Event(), torch.nn.Linear(2, 2)

    class Traced(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            is_tracing.set()
            assert may_end.wait(60)
            return value + 1

    compilation._keep_traces_apart()
    compilation._keep_traces_apart()
    thread = threading.Thread(target=torch.fx.symbolic_trace, args=(Traced(),))
    call = torch.nn.Module.__call__
    thread.start()
    try:
        assert is_tracing.wait(60)
        assert torch.nn.Module.__call__ is not call
        assert layer(torch.zeros(1, 2)).equal(layer.bias[None])
    finally:
        may_end.set()
        thread.join()
    assert torch.nn.Module.__call__ is call
    # The tracer still sees the modules that its own thread calls.
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_batches_that_do_not_fit_are_halved_when_compiled(llama: Path) -> None:
    def out_of_memory(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = graph.forward(*arguments)
            if max(value.numel() for value in result) > 200 * 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        return run

    scorer = compiled_scorer(llama, out_of_memory, 1000)
    small = ROWS[:1] * 2
    score_compiled(scorer, small)  # the compiled code exists before the large batch comes
    expected = score(make_scorer(llama), ROWS)
    check_equal(score(scorer, ROWS), expected)
    assert scorer._fitting_tokens < 1000
    check_equal(score_compiled(scorer, ROWS), expected)


def test_another_scorer_of_the_model_stays_eager(llama: Path) -> None:
    scorer = compiled_scorer(llama, traced)
    score_compiled(scorer, ROWS)
    before = runs(scorer)
    with torch.inference_mode():
        scorer._head.decoder(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert runs(scorer) == before
    # One that compiles uses the code of the first.
    other = Head(_Model(scorer._head))
    other.compile(traced)
    with torch.inference_mode():
        other.hidden(torch.ones(2, 5, dtype=torch.long))
    assert runs(scorer)[0] > before[0]


class _Model:
    """As much of a model as `Head` reads."""

    def __init__(self, head: Head) -> None:
        self.base_model, self.config, self._project = head.decoder, head.decoder.config, head._project

    def get_output_embeddings(self) -> Any:
        return self._project


def test_a_compiled_model_is_freed_at_once(llama: Path) -> None:
    """The next model may need its memory."""
    gc.collect()
    gc.disable()
    try:
        eager = make_scorer(llama, compiled=False)
        alive = [weakref.ref(eager._head.decoder.layers[0])]
        del eager
        scorer = compiled_scorer(llama, traced)
        score_compiled(scorer, ROWS)
        alive.append(weakref.ref(scorer._head.decoder.layers[0]))
        del scorer
        assert [reference() is None for reference in alive] == [True, True]
    finally:
        gc.enable()


def test_compiled_code_is_freed_with_its_function() -> None:
    """torch keeps backends in a table of its own."""
    alive: list[weakref.ref[Any]] = []

    def noting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            return graph.forward(*arguments)

        alive.append(weakref.ref(run))
        return run

    function = compilation.CompiledFunction(_doubled, "doubled", noting)
    for value in (torch.ones(3, 4), torch.ones(1, 4), torch.ones(1, 4)):
        function(value)
        compilation.finish_compiling()
    assert (function._variants, function._runs) == (2, 1)
    alive.append(weakref.ref(function))
    del function
    gc.collect()
    assert [reference() is None for reference in alive] == [True] * 3


# --- failures ---


def test_a_failing_compiler_changes_no_score(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler here\nand more")

    scorer = compiled_scorer(llama, broken)
    with caplog.at_level(logging.WARNING, "miniplm.scorer"):
        check_equal(score_compiled(scorer, ROWS), score(make_scorer(llama), ROWS))
        score_compiled(scorer, ROWS)
    warnings = [record.getMessage() for record in caplog.records]
    reason = "runs without compilation, which is slower: RuntimeError: no compiler here"
    assert warnings == [f"LlamaDecoderLayer: {reason}", f"the output layer's log-softmax: {reason}"]


def test_failing_code_is_replaced_by_eager_code(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            raise ValueError("a wrong kernel")

        return run

    scorer = compiled_scorer(llama, broken)
    with caplog.at_level(logging.WARNING, "miniplm.scorer"):
        check_equal(score_compiled(scorer, ROWS), score(make_scorer(llama), ROWS))
    assert caplog.text.count("ValueError: a wrong kernel") == 2


def test_a_failing_variant_leaves_the_others(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    graphs: list[Any] = []

    def second_fails(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        if len(graphs) > 1:
            raise RuntimeError("no second one")
        return graph.forward

    function = compilation.CompiledFunction(_doubled, "doubled", second_fails)
    several, one = torch.ones(3, 4), torch.ones(1, 4)
    for value in (several, one, one):
        function(value)
        compilation.finish_compiling()
    before = function._runs
    assert function(several).equal(2 * several)
    assert function(one).equal(2 * one)
    assert function._runs == before + 1
    assert caplog.text.count("RuntimeError: no second one") == 1


def _doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def test_variants_are_limited(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_MOST_VARIANTS", 2)
    counter = CompileCounter()
    function = compilation.CompiledFunction(_doubled, "doubled", counter)
    values = [torch.ones([3] * n_axes) for n_axes in range(1, 5)] * 2
    for value in values:
        assert function(value).equal(2 * value)
        compilation.finish_compiling()
    assert counter.frame_count == 2
    assert caplog.text.count("doubled: 2 variants are compiled") == 1


def test_a_module_without_layers_stays_eager(caplog: pytest.LogCaptureFixture) -> None:
    layers = compilation.CompiledLayers(torch.nn.Linear(2, 2))
    with layers.active():
        pass
    assert "Linear: runs without compilation, which is slower: it has no list of layers" in caplog.text


def test_layers_of_another_library_stay_eager(caplog: pytest.LogCaptureFixture) -> None:
    decoder = tiny_models.make_model("llama").model
    for layer in decoder.layers:
        layer.forward = functools.partial(type(layer).forward, layer)
    compilation.CompiledLayers(decoder)
    reason = "another library has replaced the `forward` of its layers"
    assert f"LlamaModel: runs without compilation, which is slower: {reason}" in caplog.text
    assert all(isinstance(layer.forward, functools.partial) for layer in decoder.layers)


# --- the disk, torch's own compiler, and the end of the process ---


def test_the_cache_is_in_this_nodes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after transformers has imported torch's compiler, which sets the variable to its default."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    use_disk_cache()
    folder = f"{tmp_path}/compiled/torch-{torch.__version__}"
    assert cache_dir() == f"{folder}/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == f"{folder}/triton"


def test_a_folder_that_the_user_has_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    use_disk_cache()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert os.environ[name] == str(tmp_path / name)


def test_torch_starts_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config
    from torch._inductor.async_compile import get_compile_threads

    name = "TORCHINDUCTOR_COMPILE_THREADS"
    for cores, expected in ((32, 4), (2, 2)):
        monkeypatch.delenv(name, raising=False)
        with config.patch(compile_threads=cores):
            limit_processes()
            assert (get_compile_threads(), os.environ[name]) == (expected, str(expected))
    monkeypatch.setenv(name, "16")
    with config.patch(compile_threads=16):
        limit_processes()
        assert (get_compile_threads(), os.environ[name]) == (16, "16")


SCORES = """
import sys
from tests.support.scoring_oracles import ROWS, score
from tests.support.tiny_models import make_scorer
scorer = make_scorer(sys.argv[1], 64, compiled=True)
print(*[one.nll_sum_nats for one in score(scorer, ROWS)])
"""
# Scores all the time while torch compiles, and until nothing is left to compile.
COMPILED_SCORES = """
from miniplm_udf.scoring import compilation
while compilation._is_compiling() or scorer.finish_compiling():
    print(*[one.nll_sum_nats for one in score(scorer, ROWS)])
assert all(function._runs for function in [*scorer._head._layers._functions, scorer._head._tile_nll])
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def run_python(program: str, folder: Path, cache: Path) -> list[str]:
    environment = os.environ | {"MINIPLM_CACHE": str(cache)}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "runs without compilation" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_a_second_process_finds_the_code_on_the_disk(llama: Path, tmp_path: Path) -> None:
    """With torch's own compiler: equal scores before and after, and nothing is compiled twice on a node."""
    expected = [one.nll_sum_nats for one in score(make_scorer(llama), ROWS)]
    for hits, misses in (("0", "2"), ("2", "0")):
        *lines, last = run_python(SCORES + COMPILED_SCORES, llama, tmp_path)
        for line in lines:
            assert [float(number) for number in line.split()] == pytest.approx(expected, rel=1e-5)
        assert last.split() == [hits, misses]


@pytest.mark.long
def test_a_process_may_end_while_it_compiles(llama: Path, tmp_path: Path) -> None:
    still = (
        "from miniplm_udf.scoring import compilation; import time; time.sleep(2); print(compilation._is_compiling())"
    )
    _, is_compiling = run_python(SCORES + still, llama, tmp_path)
    assert is_compiling == "True"
