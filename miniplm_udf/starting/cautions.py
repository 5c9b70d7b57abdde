"""Warnings about an experiment whose result may say little, each a sentence with its remedy. Pure.

Input: what was seen and planned. Output: sentences. Nothing here stops a run: the config runs to its end all the same.
"""

from collections import Counter
from collections.abc import Iterator

from miniplm_udf.starting import sizes
from miniplm_udf.starting.cleaning import ONE_LANGUAGE
from miniplm_udf.starting.plan import Corpus, Plan
from miniplm_udf.starting.teacher import TeacherFacts

# The teacher's parameters over the reference's; the paper's ratio is 17.
_CLOSE, _FAR = 4.0, 200.0
_FEW_DOCUMENTS = 1000
_MOST_BAD = 0.05
# A first run on cores should show scores within minutes; GPUs are for large corpora.
_LONG_SECONDS = {"cores": 600.0, "gpus": 3600.0}


def cautions(
    corpus: Corpus, teacher: TeacherFacts, plan: Plan, languages: Counter[str], bad_share: float, hint: str
) -> Iterator[str]:
    """Yields what the user should know before the run.

    Args:
        corpus: the text.
        teacher: the teacher.
        plan: the numbers of the experiment.
        languages: number of sampled texts by language.
        bad_share: share of the sampled rows that ingest would reject.
        hint: what to do about another encoding than UTF-8; empty if there is none.
    """
    yield from _of_teacher(teacher)
    yield from _of_distance(teacher, plan)
    yield from _of_reference(plan)
    if plan.aims.has_students and round(plan.student.epochs) > sizes.MOST_EPOCHS:
        yield (
            f"the students see their text {plan.student.epochs:.0f} times; they learn it by heart after about "
            f"{sizes.MOST_EPOCHS}: add text, or lower train.steps"
        )
    yield from _of_text(corpus, languages)
    if bad_share > _MOST_BAD:
        yield (
            f"about {bad_share:.0%} of the rows have no text that ingest takes, more than ingest.max_reject_share "
            f"allows: correct the files or ingest.fields{hint}"
        )
    seconds = plan.score_flops / plan.machine.flops
    if seconds > _LONG_SECONDS["gpus" if plan.machine.n_gpus else "cores"]:
        time = f"{seconds / 3600:,.0f} hours" if seconds > 7200 else f"{seconds / 60:,.0f} minutes"
        yield (
            f"scoring takes about {time} on {_words(plan)}: use {'more GPUs' if plan.machine.n_gpus else 'a GPU'} or a "
            "smaller teacher; or score a part first with score.sample=0.1, since a larger share later scores only what "
            "is missing"
        )


def _words(plan: Plan) -> str:
    machine = plan.machine
    return f"{machine.n_gpus} GPUs" if machine.n_gpus else f"the {machine.n_cores} cores of this machine"


def _of_teacher(teacher: TeacherFacts) -> Iterator[str]:
    if teacher.tuned:
        yield (
            f"the teacher may be chat-tuned ({teacher.tuned}): its losses on plain text are those of a model that "
            "expects a conversation; a base model is a better teacher"
        )
    if teacher.quantised:
        yield (
            f"the teacher is quantised ({teacher.quantised}): its rounding is a part of each score; the original "
            "weights are a better teacher, where they fit"
        )


def _of_distance(teacher: TeacherFacts, plan: Plan) -> Iterator[str]:
    if teacher.n_parameters is None:
        return
    ratio = teacher.n_parameters / plan.reference.shape.n_parameters
    if ratio < _CLOSE:
        yield (
            f"the teacher has {ratio:.2g} times the parameters of the reference that fits, and the paper's has "
            "17 times: the difference of two models of one size is mostly noise; choose a larger teacher"
        )
    if ratio > _FAR:
        yield (
            f"the teacher has {ratio:,.0f} times the parameters of the reference, and the paper's has 17 times: the "
            "difference then says little more than the teacher's loss; use a smaller teacher, or more text and FLOPs "
            "for a larger reference"
        )


def _of_reference(plan: Plan) -> Iterator[str]:
    reference = plan.reference
    if reference.tokens_per_parameter < sizes.TOKENS_PER_PARAMETER:
        yield (
            f"the reference sees {reference.n_tokens:,} tokens, {reference.tokens_per_parameter:.2g} for each weight "
            f"outside its embeddings, and about {sizes.TOKENS_PER_PARAMETER} are a good number: its losses may hardly "
            "differ from text to text, and the difference is then the teacher's loss alone; add text, or name a small "
            "model that was trained on other text in models.reference.path and remove the section reference"
        )
    if round(reference.epochs) > sizes.MOST_EPOCHS:
        yield (
            f"the reference sees its text {reference.epochs:.0f} times, and learns it by heart after about "
            f"{sizes.MOST_EPOCHS}: add text, or lower reference.train.steps"
        )


def _of_text(corpus: Corpus, languages: Counter[str]) -> Iterator[str]:
    if corpus.n_documents < _FEW_DOCUMENTS:
        yield (
            f"there are only {corpus.n_documents:,} documents: the run shows how the method works, and its numbers "
            "say little about the method"
        )
    if not languages:
        return
    shares = [(name, n_texts / languages.total()) for name, n_texts in languages.most_common(4)]
    if shares[0][1] < ONE_LANGUAGE:
        mixture = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        yield (
            f"the languages are mixed ({mixture}): a ranking of all together prefers the languages that the teacher "
            "knows best; set select.per_source: same with a source for each language, or filter by `language`"
        )
