"""The distillation loss in chunks: equal to the formula over all logits, in value and gradients; a fraction of their
memory; for heads of every kind, of student and teacher.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.allocations import peak_bytes
from tests.support.loops import LENGTH, VOCAB, make_teacher
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.losses import chunked_head
from trainer.losses.chunked_head import chunk_positions, chunked_losses, losses_of_logits
from trainer.losses.kd_loss import kd_chunk_loss, kd_chunk_positions, kd_losses
from trainer.losses.kd_teacher import Teacher
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM, Losses
from trainer.models.model import build_model, model_config

OTHER_HEADS: dict[str, dict[str, Any]] = {
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 8},
    "cohere": LLAMA | {"model_type": "cohere"},
    "gptj": {"model_type": "gptj", "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
}


def plain_losses(
    logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, ratio: float
) -> torch.Tensor:
    """The three losses from all logits; the teacher's are those of the tokenizer's ids."""
    log_p, log_q = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    lm = (F.nll_loss(log_p.flatten(0, -2), targets.flatten(), reduction="none") * weights.flatten()).sum()
    divergence = F.kl_div(log_p[..., : log_q.shape[-1]], log_q, reduction="none", log_target=True).sum(-1)
    kl = (divergence * weights).sum()
    return torch.stack([(1 - ratio) * lm + ratio * kl, lm, kl])


def inputs(n: int, width: int, vocabulary: int, n_ids: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, the teacher's hidden states and weight, targets and their weights (some 0)."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, width, generator=generator) * size).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    teacher_hidden = torch.randn(n, 2 * width, generator=generator) * size
    teacher_weight = torch.randn(n_ids, 2 * width, generator=generator)
    targets = torch.randint(0, n_ids, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) / n
    weights[: n // 4] = 0
    return hidden, weight, teacher_hidden, teacher_weight, targets, weights


def in_chunks(values: tuple[torch.Tensor, ...], ratio: float, of_logits: bool = False) -> tuple[torch.Tensor, ...]:
    """The loss to differentiate, and the two others."""
    hidden, weight, teacher_hidden, teacher_weight, targets, weights = values
    losses_of = kd_losses(lambda part: teacher_hidden[part] @ teacher_weight.T, targets, weights, ratio)
    size = kd_chunk_positions(len(targets), len(weight), "cpu")
    if of_logits:
        return losses_of_logits(hidden @ weight.T, losses_of, 3, size)
    return chunked_losses(hidden, weight, losses_of, 3, size)


@pytest.mark.parametrize("of_logits", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("size", [0.1, 5.0])
@pytest.mark.parametrize("n_ids", [37, 30])
def test_losses_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, n_ids: int, size: float, ratio: float, of_logits: bool
) -> None:
    monkeypatch.setitem(chunked_head._MOST_POSITIONS, "cpu", 14)
    monkeypatch.setattr(chunked_head, "_FEWEST_ENTRIES", 1)
    values = inputs(50, 8, 37, n_ids, size)
    hidden, weight, teacher_hidden, teacher_weight, targets, weights = values
    expected = plain_losses(hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets, weights, ratio)
    gradients = torch.autograd.grad(expected[0] * 3, (hidden, weight))
    total, others = in_chunks(values, ratio, of_logits)
    torch.testing.assert_close(torch.cat([total[None], others]), expected, atol=1e-5, rtol=1e-5)
    assert not others.requires_grad
    for result, value in zip(torch.autograd.grad(total * 3, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)


def test_equal_predictions_have_no_divergence() -> None:
    logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)) * 10
    gradient, targets, weights = logits.clone(), torch.zeros(9, dtype=torch.int64), torch.ones(9)
    losses, at_target = kd_chunk_loss(gradient, logits.clone(), targets, weights, 1.0)
    gradient.scatter_(1, targets[:, None], at_target[:, None])
    assert losses[2].item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_an_entry_that_the_teacher_excludes_has_probability_0() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.5, -torch.inf, 1.0]])
    targets, weights = torch.tensor([1]), torch.ones(1)
    log_p, q = student.log_softmax(-1)[0], torch.tensor([0.5, 1.0]).softmax(-1)
    losses, at_target = kd_chunk_loss(student, teacher, targets, weights, 0.5)
    assert losses[2].item() == pytest.approx(float((q * (q.log() - log_p[[0, 2]])).sum()), abs=1e-6)
    assert at_target.item() == pytest.approx(float(log_p[1].exp()) - 0.5, abs=1e-6)
    assert student[0, [0, 2]].tolist() == pytest.approx((log_p[[0, 2]].exp() - 0.5 * q).tolist(), abs=1e-6)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4096, generator=generator).bfloat16()
    teacher, targets, weights = torch.randn(4, 4096, generator=generator), torch.arange(4), torch.ones(4)
    expected = plain_losses(logits, teacher, targets, weights, 0.5)
    losses, at_target = kd_chunk_loss(logits, teacher.clone(), targets, weights, 0.5)
    assert (losses.dtype, at_target.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


def test_the_padding_of_the_teachers_vocabulary_is_dropped() -> None:
    # The padding takes mass m of the teacher's probability; without it the others grow by the factor 1 / (1 - m).
    teacher = make_teacher(LLAMA | {"vocab_size": VOCAB + 24}, vocab_size=VOCAB)
    tokens = torch.arange(LENGTH)[None]
    whole = teacher.model(input_ids=tokens).logits[0].softmax(-1)
    padding = whole[:, VOCAB:].sum(-1, keepdim=True)
    assert float(padding.min()) > 0.01
    q = teacher.logits(teacher.hidden(tokens)[0]).softmax(-1)
    torch.testing.assert_close(q, whole[:, :VOCAB] / (1 - padding), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("device", "parts"), [("cpu", 2), ("cuda", 4)])
def test_a_chunk_is_a_part_of_a_chunk_without_a_teacher(device: str, parts: int) -> None:
    assert kd_chunk_positions(16_384, 151_936, device) * parts == chunk_positions(16_384, 151_936, device)
    assert kd_chunk_positions(1, 40, "cpu") == 1


def test_the_peak_of_loss_and_backward_is_a_quarter_of_the_logits_at_most() -> None:
    values = inputs(2048, 64, 8192, 8192)
    logits, device = 2048 * 8192 * 4, torch.device("cpu")
    # The gradients of hidden states and weight are counted, too.
    assert peak_bytes(lambda: in_chunks(values, 0.5)[0].backward(), device) <= 0.25 * logits
    hidden, weight, teacher_hidden, teacher_weight, targets, weights = values

    def whole() -> None:
        plain_losses(hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets, weights, 0.5)[0].backward()

    assert peak_bytes(whole, device) >= 3 * logits


def build(architecture: dict[str, Any]) -> Any:
    config = model_config(architecture, where="x", vocab_size=VOCAB, separator_id=3, max_positions=LENGTH)
    model = build_model(config, where="x", seed=0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def module_losses(module: CausalLMWithLoss) -> Losses:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=generator)
    losses: Losses = module(tokens[:, :-1], tokens[:, 1:], torch.rand(3, LENGTH, generator=generator))
    return losses


def expected_losses(model: Any, teacher: Any, ratio: float, prefix: int | None = None) -> torch.Tensor:
    """The losses of `module_losses` from the logits that the two models give themselves."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=generator)
    weights, inputs_BT = torch.rand(3, LENGTH, generator=generator), tokens[:, :-1]
    if prefix is None:
        teacher_logits = teacher(input_ids=inputs_BT).logits
    else:
        teacher_logits = teacher(input_ids=F.pad(inputs_BT, (1, 0), value=prefix)).logits[:, 1:]
    logits = model(input_ids=inputs_BT).logits
    return plain_losses(logits, teacher_logits.detach(), tokens[:, 1:], weights, ratio)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("llama", "llama"), ("qwen2", "gemma2"), ("mamba", "cohere"), ("gemma2", "gptj"), ("gptj", "gpt2")],
)
def test_the_module_has_the_losses_of_the_models_own_logits(student: str, teacher: str) -> None:
    architectures = FAMILIES | OTHER_HEADS
    model, frozen = build(architectures[student]), make_teacher(architectures[teacher])
    module = DistilledCausalLM(model, frozen, 0.4)
    assert module.has_plain_head == (student not in OTHER_HEADS)
    results = []
    for losses in (module_losses(module), expected_losses(model, frozen.model, 0.4)):
        losses[0].backward()
        results.append([losses[0].detach(), *(weight.grad.clone() for weight in model.parameters())])
        model.zero_grad()
    for result, value in zip(*results, strict=True):
        torch.testing.assert_close(result, value, atol=1e-4, rtol=1e-5)


def test_the_teacher_sees_the_token_of_its_pre_training_in_front() -> None:
    model, teacher = build(LLAMA), make_teacher(bos_id=5)
    losses = module_losses(DistilledCausalLM(model, teacher, 1.0))
    torch.testing.assert_close(losses.total, expected_losses(model, teacher.model, 1.0, prefix=5)[0])
    assert not torch.allclose(losses.total, expected_losses(model, teacher.model, 1.0)[0], atol=1e-3)


def test_documents_are_masked_in_the_teacher_too() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(3, -1)
    teacher = make_teacher()
    inputs_BT = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    changed = inputs_BT.clone()
    changed[:, :5] = 7
    masked, other = (teacher.hidden(tokens, positions) for tokens in (inputs_BT, changed))
    assert torch.equal(masked[:, 5:], other[:, 5:])
    assert not torch.allclose(masked[:, 5:], teacher.hidden(inputs_BT)[:, 5:], atol=1e-3)


def test_the_teacher_is_no_part_of_the_module() -> None:
    model, teacher = build(LLAMA), make_teacher()
    module = DistilledCausalLM(model, teacher, 0.5).train()
    assert not teacher.model.training
    assert module.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    assert len(list(module.parameters())) == len(list(model.parameters()))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    module_losses(module).total.backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(weight.grad is None for weight in teacher.model.parameters())


def test_the_teacher_computes_in_its_own_dtype_under_autocast() -> None:
    teacher: Teacher = make_teacher()
    tokens = torch.arange(LENGTH)[None]
    expected = teacher.logits(teacher.hidden(tokens)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.logits(teacher.hidden(tokens)[0]), expected)
