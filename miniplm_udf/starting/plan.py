"""The numbers of a first experiment: lengths, splits, models, steps, from the text, the teacher and the machine. Pure.

Input: what was seen (`texts.py`, `fields.py`, `teacher.py`). Output: a `Plan`, which the template writes with its
reasons. The rules are the paper's (arXiv 2410.17215) where the text is large enough: half of the tokens, 1,025 tokens
in an instance, a reference of a seventeenth of the teacher. A smaller corpus gets shorter instances, smaller models.
"""

import dataclasses
from collections.abc import Sequence

from miniplm_udf.config.sections import SplitConfig
from miniplm_udf.ingestion.documents import split_of
from miniplm_udf.starting import sizes
from miniplm_udf.starting.sizes import PlannedTraining, Shape
from miniplm_udf.starting.teacher import TeacherFacts

ALPHA = 0.5
_LONGEST, _SHORTEST = 1024, 64
# Whole texts: the longest input, and the share of the texts that fit into one. Some texts have shorter tokens than the
# mean, and the mean of a tokenizer that is not here is only assumed.
_LONGEST_WHOLE, _WHOLE_SHARE = 8192, 0.99
_MARGIN, _MARGIN_OF_ASSUMED = 1.25, 1.75
# Instances to choose among, at least; documents to evaluate on.
_INSTANCES, _HELDOUT_DOCUMENTS = 1000, 50
_SHARES = (0.05, 0.35)
_LEAST_RATIO = 12
# FLOPs per second of one core (fp32) and one GPU (bf16), for sizes that end in time; `miniplm estimate` measures.
_CORE_FLOPS, _GPU_FLOPS = 4e10, 2e14
_CPU_SECONDS, _GPU_SECONDS = 180.0, 12 * 3600.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processors that score and train.

    Attributes:
        n_gpus: GPUs; 0 computes on the cores.
        n_cores: cores.
    """

    n_gpus: int
    n_cores: int

    @property
    def flops(self) -> float:
        """About how many FLOPs it does in a second."""
        return self.n_gpus * _GPU_FLOPS if self.n_gpus else self.n_cores * _CORE_FLOPS

    @property
    def budget(self) -> float:
        """FLOPs for the training of one model."""
        return self.flops * (_GPU_SECONDS if self.n_gpus else _CPU_SECONDS)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How much text there is; estimates, unless the sample was the whole input.

    Attributes:
        n_documents: number of documents.
        n_bytes: bytes of their texts.
        texts: all texts, if the sample was the whole input; else empty.
        lengths: bytes of each sampled text.
    """

    n_documents: int
    n_bytes: int
    texts: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Aims:
    """The aims of an experiment, which the user chooses.

    Attributes:
        has_students: whether students are trained. Without them no text is held out.
        has_whole_texts: whether each text is an instance by itself, instead of a part of packed ones.
    """

    has_students: bool = True
    has_whole_texts: bool = False


DEFAULT_AIMS = Aims()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of an experiment.

    Attributes:
        n_tokens: tokens of the corpus, as the teacher counts them.
        context: tokens of a model's longest input.
        split: shares of the reference and of the held-out texts.
        reference: the training of the reference.
        student: the training of each student.
        student_ids: size of the students' tokenizer.
        shards: streams of the packing.
        state_partitions: partitions of ingest's state.
        workers: concurrent scorers.
        score_flops: FLOPs of the scoring with both models.
        machine: the machine.
        aims: what the user wants.
        cut_share: share of the sampled texts that are longer than an instance; 0 for packed instances.
    """

    n_tokens: int
    context: int
    split: SplitConfig
    reference: PlannedTraining
    student: PlannedTraining
    student_ids: int
    shards: int
    state_partitions: int
    workers: int
    score_flops: float
    machine: Machine
    aims: Aims = DEFAULT_AIMS
    cut_share: float = 0.0

    @property
    def pool(self) -> float:
        """Tokens that are scored."""
        return self.n_tokens * (1 - self.split.reference - self.split.heldout)


def make_plan(corpus: Corpus, teacher: TeacherFacts, machine: Machine, aims: Aims = DEFAULT_AIMS) -> Plan:
    """Returns the numbers of an experiment.

    Args:
        corpus: the text.
        teacher: the teacher.
        machine: what computes.
        aims: what the user wants.
    """
    n_tokens = max(1, round(corpus.n_bytes / teacher.bytes_per_token))
    lengths = [length / teacher.bytes_per_token for length in corpus.lengths]
    is_whole = aims.has_whole_texts and bool(lengths)
    context = _whole_context(lengths, teacher) if is_whole else _context(n_tokens, teacher)
    n_teacher = teacher.n_parameters or 10**9
    shape = sizes.largest(teacher.n_ids, _SHARES[1] * n_tokens, machine.budget, n_teacher / _LEAST_RATIO)
    wanted = sizes.wanted_tokens(shape, machine.budget)
    split = _split(corpus, min(max(wanted / n_tokens, _SHARES[0]), _SHARES[1]), aims.has_students)
    has_gpu = machine.n_gpus > 0
    reference = sizes.training(shape, split.reference * n_tokens, machine.budget, context, has_gpu)
    pool = n_tokens * (1 - split.reference - split.heldout)
    student_ids = _vocabulary(corpus.n_bytes)
    student_shape = sizes.largest(student_ids, ALPHA * pool, machine.budget, n_teacher / 2)
    return Plan(
        n_tokens=n_tokens,
        context=context,
        split=split,
        reference=reference,
        student=sizes.training(student_shape, ALPHA * pool, machine.budget, context, has_gpu),
        student_ids=student_ids,
        shards=256 if n_tokens > 10**10 else 32 if n_tokens > 10**9 else 1,
        state_partitions=2 if corpus.n_bytes < 10**9 else 8 if corpus.n_bytes < 10**11 else 64,
        workers=max(1, machine.n_gpus),
        score_flops=2.0 * (n_teacher + shape.n_parameters) * pool,
        machine=machine,
        aims=aims,
        cut_share=sum(length > context for length in lengths) / len(lengths) if is_whole else 0.0,
    )


def _context(n_tokens: int, teacher: TeacherFacts) -> int:
    """Tokens of the longest input: the paper's 1,024, unless the teacher's context or the corpus is shorter."""
    longest = (teacher.longest or _LONGEST) - (teacher.prefix is not None)
    context = _LONGEST
    while context > 256 and n_tokens / context < _INSTANCES:
        context //= 2
    while context > longest and context > _SHORTEST:
        context //= 2
    return min(context, longest)


def _whole_context(lengths: Sequence[float], teacher: TeacherFacts) -> int:
    """Tokens of the longest input, so that nearly all texts fit into one; at most the teacher's context."""
    margin = _MARGIN if teacher.is_measured else _MARGIN_OF_ASSUMED
    wanted = margin * sorted(lengths)[int(_WHOLE_SHARE * (len(lengths) - 1))]
    longest = min((teacher.longest or _LONGEST_WHOLE) - (teacher.prefix is not None), _LONGEST_WHOLE)
    context = _SHORTEST
    while context < wanted and context < longest:
        context *= 2
    return min(context, longest)


def _split(corpus: Corpus, reference: float, has_heldout: bool) -> SplitConfig:
    """Returns the shares of the splits. In a small corpus, they grow until each split has a text.

    The split of a text follows from its hash, so it is known before ingest.
    """
    heldout = min(max(_HELDOUT_DOCUMENTS / max(1, corpus.n_documents), 0.001), 0.1) if has_heldout else 0.0
    split = SplitConfig(reference=round(reference, 3), heldout=round(heldout, 3))
    if len(corpus.texts) >= 10 * _HELDOUT_DOCUMENTS or not corpus.texts:
        return split
    while split.reference + split.heldout < 0.8:
        counts = _counts(corpus.texts, split)
        wanted = {"reference": True, "heldout": has_heldout}
        grown = {name: 0.05 if is_wanted and not counts[name] else 0.0 for name, is_wanted in wanted.items()}
        if not any(grown.values()):
            return split
        split = SplitConfig(
            reference=round(split.reference + grown["reference"], 3), heldout=round(split.heldout + grown["heldout"], 3)
        )
    return split


def _counts(texts: Sequence[str], split: SplitConfig) -> dict[str, int]:
    names = [split_of(text, split) for text in texts]
    return {name: names.count(name) for name in ("reference", "heldout", "pool")}


def _vocabulary(n_bytes: int) -> int:
    """The students' vocabulary: a larger one needs more text for each of its tokens."""
    return next((size for limit, size in ((10**8, 8192), (10**10, 16384)) if n_bytes < limit), 32768)


def architecture(shape: Shape, model_type: str) -> dict[str, str | int | bool]:
    """Returns the keywords of transformers' `AutoConfig` for a shape.

    Args:
        shape: the shape.
        model_type: llama or qwen2, whose keywords are the same.
    """
    return {
        "model_type": model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "tie_word_embeddings": True,
    }
