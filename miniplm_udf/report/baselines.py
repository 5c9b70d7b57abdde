"""The baseline of each student, and the difference to it. Driver only; no Spark.

The baseline is the student that differs in the corpus only, and whose corpus is a random part of the candidates or all
of them. A baseline has no baseline. Input: the sections of the config. Losses are in bits per byte of held-out text.
"""

import dataclasses
import json
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from miniplm_udf.config.experiment import to_dict
from miniplm_udf.config.training import KEYS_WITHOUT_EFFECT, StudentConfig

T = TypeVar("T")

# Below these a difference between two students is noise. The paper's smallest comparison trains on 50 billion tokens.
NOISE_TRAINING_TOKENS = 1_000_000_000
NOISE_HELDOUT_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A comparison of two students.

    Attributes:
        name, baseline: the student, and the student that it is compared with.
        bits_per_byte: held-out bits per byte of `name` minus bits per byte of `baseline`; below 0, `name` is better.
        relative: `bits_per_byte` as a share of the baseline's.
        is_noise: whether a training or its held-out text is so small that the difference may be noise.
    """

    name: str
    baseline: str
    bits_per_byte: float
    relative: float
    is_noise: bool

    @property
    def is_win(self) -> bool:
        """Whether `name` has fewer held-out bits per byte than `baseline`; noise is not considered."""
        return self.bits_per_byte < 0

    @property
    def reading(self) -> str:
        """The difference in words, with a remark if it may be noise."""
        words = "lower (better)" if self.is_win else "higher (worse)"
        return f"{words}: noise at this size" if self.is_noise else words


def setting_without_corpus(student: StudentConfig, *, with_seed: bool) -> str:
    """Returns the settings of a training except its corpus: equal for two students that differ in the corpus only.

    Args:
        student: the student, with the keys of its named model filled in.
        with_seed: whether students with different values of `train.seed` differ.
    """
    values = to_dict(student)
    train = {key: value for key, value in values["train"].items() if key not in KEYS_WITHOUT_EFFECT}
    if student.train.kd_ratio:
        train["kd_teacher"] = student.train.kd_teacher
    if not with_seed:
        del train["seed"]
    return json.dumps([values["architecture"], values["tokenizer"], train], sort_keys=True)


def with_baselines(
    students: Sequence[T], setting: Callable[[T], Hashable], is_baseline: Callable[[T], bool]
) -> list[tuple[T, T]]:
    """Returns each student that has a baseline, with that baseline: the first one of the same setting.

    Args:
        students: the students, or groups of their trainings.
        setting: the settings of a student except its corpus; None if they are not known.
        is_baseline: whether the corpus of a student is random or whole.
    """
    baselines: dict[Hashable, T] = {}
    for student in students:
        if is_baseline(student):
            baselines.setdefault(setting(student), student)
    return [
        (student, baselines[key])
        for student in students
        if (key := setting(student)) is not None and key in baselines and not is_baseline(student)
    ]


def is_small(training_tokens: int, heldout_tokens: int) -> bool:
    """Returns whether a training, or the held-out text, is so small that a difference may be noise.

    Args:
        training_tokens: tokens that the student was trained on.
        heldout_tokens: tokens that it was evaluated on.
    """
    return training_tokens < NOISE_TRAINING_TOKENS or heldout_tokens < NOISE_HELDOUT_TOKENS
