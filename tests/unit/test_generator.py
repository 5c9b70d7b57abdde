"""Generation: a continuation depends on its own row alone, its tokens have the model's distribution, and it ends."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scoring.generator import Generator, _GumbelNoise, row_seed, uniform
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.results import Failure, Generation
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.workers.model_scorers import ModelGeneratorFactory, ModelScorerFactory
from miniplm_udf.workers.worker_scorers import TextGenerator
from tests.support.tiny_models import BOS_ID, FAMILIES, make_bos_folder, make_model_folder

TEXTS = [f"the quick brown fox number {n} jumps over the lazy dog and the tests of it" for n in range(5)]
SETTINGS = GenerateConfig(prompt_tokens=12, new_tokens=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models"), factor=3.0)


def make(folder: Path, rows_per_batch: int = 5, **settings: Any) -> Generator:
    config = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=8)
    description = describe("teacher", config, "float32")
    budget = rows_per_batch * (SETTINGS.prompt_tokens + SETTINGS.new_tokens + 1)
    chosen = dataclasses.replace(SETTINGS, tokens_per_batch=budget, **settings)
    return Generator(load_model(config, description), load_tokenizer(folder), description, chosen)


def run(generator: Generator, texts: list[str] = TEXTS, ids: list[str] | None = None) -> list[Generation | Failure]:
    tokenized = generator.tokenize(texts, [()] * len(texts))
    return generator.generate(tokenized, [True] * len(texts), ids or [f"id{n}" for n in range(len(texts))])


def tokens(result: Generation | Failure) -> list[int]:
    assert isinstance(result, Generation)
    return list(np.frombuffer(result.token_ids, "<i4").tolist())


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_continuation_does_not_depend_on_its_batch(folder: Path, temperature: float) -> None:
    alone = run(make(folder, 1, temperature=temperature))
    assert run(make(folder, 3, temperature=temperature)) == alone
    # Nor on its place, or on what came before.
    generator = make(folder, 5, temperature=temperature)
    assert run(generator, TEXTS[::-1], [f"id{n}" for n in range(5)][::-1])[::-1] == alone
    assert run(generator) == alone


def test_the_factory_of_the_workers_makes_it(folder: Path) -> None:
    config = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=8)
    description = describe("teacher", config, "float32")
    factory = ModelGeneratorFactory(config, description, SETTINGS, ScoreConfig())
    generator = pickle.loads(pickle.dumps(factory))()
    assert isinstance(generator, TextGenerator)
    assert run(generator) == run(make(folder))
    other_seed = dataclasses.replace(factory, settings=dataclasses.replace(SETTINGS, seed=1))
    assert len({factory.key, other_seed.key, ModelScorerFactory(config, description, ScoreConfig()).key}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_continuation_is_that_of_a_plain_loop(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path, family)
    generator = make(folder, temperature=0.0)
    tokenizer = load_tokenizer(folder)
    for text, result in zip(TEXTS, run(generator), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:12]
        for _ in range(20):
            with torch.no_grad():
                logits_V = generator._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits_V[tokenizer.get_vocab_size() :] = -torch.inf
            ids.append(int(logits_V.argmax()))
            if ids[-1] == 0:
                break
        assert tokens(result) == ids


def test_seeds_ids_and_settings_change_the_text_and_nothing_else_does(folder: Path) -> None:
    first = [tokens(result) for result in run(make(folder))]
    assert len({tuple(ids) for ids in first}) == 5
    assert [tokens(result) for result in run(make(folder))] == first
    for changed in (make(folder, seed=1), make(folder, temperature=2.0), make(folder, top_p=0.5)):
        assert [tokens(result) for result in run(changed)] != first
    other_ids = run(make(folder), ids=["a", "b", "c", "d", "e"])
    assert [tokens(result) for result in other_ids] != first
    same_text = run(make(folder), [TEXTS[0]] * 5)
    assert len({tuple(tokens(result)) for result in same_text}) == 5


def test_the_parts_of_a_generation(folder: Path) -> None:
    generator = make(folder)
    tokenizer = load_tokenizer(folder)
    results = run(generator, [*TEXTS, "the lazy dog", ""])
    for text, result in zip(TEXTS, results, strict=False):
        assert isinstance(result, Generation)
        assert tokens(result)[:12] == tokenizer.encode(text, add_special_tokens=False).ids[:12]
        assert (result.n_prompt_tokens, result.n_tokens) == (12, len(tokens(result)) - 12)
        new = tokens(result)[12:]
        assert result.end_reason == ("eos" if new[-1] == 0 else "length")
        assert new.count(0) == (result.end_reason == "eos")
        assert result.end_reason == "eos" or len(new) == 20
        assert max(new) < tokenizer.get_vocab_size(), "the model has 320 rows"
    short, empty = results[5:]
    assert isinstance(short, Generation)
    assert (short.n_prompt_tokens, short.n_tokens, short.end_reason) == (len(tokens(short)), 0, "prompt")
    assert tokens(short) == [*tokenizer.encode("the lazy dog", add_special_tokens=False).ids, 0]
    assert isinstance(empty, Failure)
    assert empty.reason == "no_tokens"


def test_documents_inside_an_instance_are_separated(folder: Path) -> None:
    generator = make(folder, prompt_tokens=30)
    tokenizer = load_tokenizer(folder)
    tokenized = generator.tokenize(["the fox the dog"], [[8]])
    (result,) = generator.generate(tokenized, [False], ["a"])
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in ("the fox ", "the dog")]
    assert tokens(result) == [*parts[0], 0, *parts[1]]


def test_a_model_that_ends_at_once(folder: Path) -> None:
    generator = make(folder)
    forward = generator._model.forward

    def ends(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits[..., 0] = 1000.0
        return output

    generator._model.forward = ends
    assert [(result.n_tokens, result.end_reason) for result in run(generator)] == [(1, "eos")] * 5  # type: ignore[union-attr]


def test_a_row_with_nan_fails_alone(folder: Path) -> None:
    generator = make(folder)
    good = run(generator)
    forward, calls = generator._model.forward, []

    def breaks(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        calls.append(1)
        if len(calls) == 3:
            output.logits[1, -1, 7] = torch.nan
        return output

    generator._model.forward = breaks
    results = run(generator)
    assert results[1] == Failure("nan_logits", "expected finite logits for each next token, found NaN")
    assert [*results[:1], *results[2:]] == [*good[:1], *good[2:]]


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(folder: Path) -> None:
    good = run(make(folder))
    generator = make(folder)
    generate, sizes = generator._model.generate, []

    def fits_two(input_ids: Any, **named: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory")
        return generate(input_ids, **named)

    generator._model.generate = fits_two
    assert run(generator) == good
    assert sizes == [5, 2, 3, 1, 2]

    def fits_none(input_ids: Any, **named: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    generator._model.generate = fits_none
    assert {result.reason for result in run(generator, TEXTS[:2])} == {"out_of_memory"}  # type: ignore[union-attr]


def test_progress_is_reported_in_each_step_and_may_stop_the_batch(folder: Path) -> None:
    generator, reported = make(folder), []
    generator.on_progress = reported.append
    results = run(generator)
    assert sum(reported) == sum(result.n_tokens for result in results if isinstance(result, Generation))
    assert len(reported) > 10

    def stop(n_tokens: int) -> None:
        raise KeyError("the worker is gone")

    generator.on_progress = stop
    with pytest.raises(KeyError):
        run(generator)


def test_a_bos_stands_in_front_and_is_not_part_of_the_text(tmp_path: Path) -> None:
    generator = make(make_bos_folder(tmp_path, "llama", "add_bos_token"))
    seen: list[int] = []
    generate = generator._model.generate

    def look(input_ids: Any, **named: Any) -> Any:
        seen.extend(input_ids[:, 0].tolist())
        return generate(input_ids, **named)

    generator._model.generate = look
    results = run(generator)
    assert seen == [BOS_ID] * 5
    assert all(tokens(result)[0] != BOS_ID and result.n_prompt_tokens == 12 for result in results)  # type: ignore[union-attr]


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    # The first outputs for the seed 1234567, as published with other implementations.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    results = uniform(torch.tensor(1234567), torch.arange(1, 5))
    assert results.tolist() == [((number >> 12) + 0.5) * 2.0**-52 for number in expected]


def test_draws_follow_the_softmax() -> None:
    """20,000 rows, each with its own numbers: the shares of the tokens are their probabilities, in every step."""
    n_rows, n_prompt = 20_000, 3
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, -torch.inf])
    probabilities_V = torch.softmax(logits_V.double(), dim=-1)
    noise = _GumbelNoise(n_prompt, [row_seed(0, f"instance {n}") for n in range(n_rows)])
    draws = []
    for step in range(3):
        ids_BT = torch.zeros(n_rows, n_prompt + step, dtype=torch.long)
        draws.append(noise(ids_BT, logits_V.repeat(n_rows, 1)).argmax(dim=-1))
        counts_V = torch.bincount(draws[-1], minlength=6).double()
        deviation_V = (n_rows * probabilities_V * (1 - probabilities_V)).sqrt()
        assert ((counts_V - n_rows * probabilities_V).abs() <= 4 * deviation_V).all()
    # Steps are independent: pairs have the product of the probabilities.
    pairs = torch.bincount(draws[0] * 6 + draws[1], minlength=36).double()
    expected = n_rows * torch.outer(probabilities_V, probabilities_V).flatten()
    assert ((pairs - expected).abs() <= 5 * expected.clamp(min=1).sqrt()).all()


def test_the_sampling_of_generate_has_the_models_distribution(folder: Path) -> None:
    """The first new token of 2,000 instances with one text, temperature and top-p: as transformers computes them."""
    generator = make(folder, 500, temperature=0.7, top_p=0.8, new_tokens=1)
    results = run(generator, [TEXTS[0]] * 2000, [f"id{n}" for n in range(2000)])
    ids = load_tokenizer(folder).encode(TEXTS[0], add_special_tokens=False).ids[:12]
    with torch.no_grad():
        logits_V = generator._model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    logits_V[load_tokenizer(folder).get_vocab_size() :] = -torch.inf
    sorted_V, order_V = torch.softmax(logits_V / 0.7, dim=-1).sort(descending=True)
    kept = int((sorted_V.cumsum(0) < 0.8).sum()) + 1
    probabilities_V = torch.zeros_like(logits_V)
    probabilities_V[order_V[:kept]] = sorted_V[:kept] / sorted_V[:kept].sum()
    counts_V = torch.bincount(torch.tensor([tokens(result)[12] for result in results]), minlength=320).double()
    assert 3 < kept < 300
    assert counts_V[probabilities_V == 0].sum() == 0
    deviation_V = (2000 * probabilities_V * (1 - probabilities_V)).sqrt()
    assert ((counts_V - 2000 * probabilities_V).abs() <= 4 * deviation_V + 1e-9).all()
