"""Fits the scaling law L(C) = A / C^alpha + floor to losses, extrapolates it, and compares the compute of two laws.

Inputs: points (training compute in FLOP, loss) of the runs of one student. Outputs: a law, 90 % intervals from a
bootstrap, and the reasons why the points do not determine the law, if they do not. The fit minimises the Huber loss of
the residuals of log(loss), so that a single bad point moves it little. `scaling.runs` reads the points, and
`scaling.command` is the command. Pure functions of numpy and scipy; the same points and seed give the same result.

Source: arXiv 2410.17215 for the law, which it extrapolates to 1T and 10T tokens; arXiv 2203.15556, section 3.3, for the
Huber loss of the log losses, here with a delta that follows the scatter of the points.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import least_squares
from scipy.special import ndtri, stdtrit

from miniplm_udf.errors import CorpusError

COVERAGE = 0.9
# Huber's delta of the first fit, which measures the scatter. The second fit takes `_DELTA_IN_SCATTERS` times the
# scatter: with normal errors, its variance is then 5 % above the variance of least squares.
_FIRST_DELTA, _SMALLEST_DELTA, _DELTA_IN_SCATTERS = 1e-3, 1e-6, 1.345
_N_CONSTANTS = 3
_FEWEST_COMPUTES = 5
# Bounds of the exponent in a fit. The paper's are 0.41 to 0.59; beyond 10, A would not fit a double.
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = 1e-3, 10.0
# A fit whose floor is a smaller share of the smallest loss than this has found no floor.
_SMALLEST_FLOOR_SHARE = 0.01
# Median of the absolute value of a normal variable, in standard deviations.
_MEDIAN_IN_SCATTERS = 0.6745
# Limit of the steps of a fit to resampled points. A law that the points determine takes about 5.
_REPLICATE_STEPS = 100
# The fall of the loss must be this many times the scatter around the law.
_SMALLEST_FALL = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The law L(C) = coefficient / C^exponent + floor.

    Attributes:
        coefficient: A, above 0, in the unit of the loss times FLOP^exponent.
        exponent: alpha, above 0.
        floor: the loss at infinite compute, in the unit of the loss.
    """

    coefficient: float
    exponent: float
    floor: float

    def loss(self, compute_flop: float) -> float:
        """Returns the loss after a training.

        Args:
            compute_flop: training compute in FLOP, above 0.
        """
        return self.floor + math.exp(math.log(self.coefficient) - self.exponent * math.log(compute_flop))

    def compute(self, loss: float) -> float:
        """Returns the training compute that reaches a loss.

        Args:
            loss: a loss, in the unit of the law's loss.

        Returns:
            FLOP; infinity if the loss is not above the floor.
        """
        if loss <= self.floor:
            return math.inf
        log_compute = (math.log(self.coefficient) - math.log(loss - self.floor)) / self.exponent
        return math.exp(min(700.0, max(-700.0, log_compute)))  # within the range of a double


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The losses of one training run.

    Attributes:
        compute_flop: training compute of each point in FLOP, above 0, ascending.
        loss: loss of each point, above 0, in one unit (nats per token, or bits per byte).
    """

    compute_flop: tuple[float, ...]
    loss: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.compute_flop) == len(self.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalEstimate:
    """An estimate and the ends of its 90 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """A law that was fitted to the runs of one student.

    Attributes:
        law: the fitted law.
        exponent: the law's exponent.
        floor: the law's floor, in the unit of the loss.
        undetermined: why the points do not determine the law, one sentence each; empty if they do.
        curves: the points of the fit.
        replicates: the laws fitted to the resampled points.
    """

    law: ScalingLaw
    exponent: IntervalEstimate
    floor: IntervalEstimate
    undetermined: tuple[str, ...]
    curves: tuple[LossCurve, ...]
    replicates: tuple[ScalingLaw, ...]

    @property
    def largest_flop(self) -> float:
        """The compute of the largest point, in FLOP."""
        return max(max(curve.compute_flop) for curve in self.curves)


def fit_law(curves: Sequence[LossCurve], *, replicates: int = 1000, seed: int = 0) -> ScalingFit:
    """Fits the law to the runs of one student.

    The bootstrap keeps the compute of the points and resamples their residuals, because a draw of whole points could
    leave out the few small runs that determine the exponent. The residuals are drawn in blocks of neighbours, because
    neighbours on one curve may deviate together; a block is as long as the cube root of the points of a run. A run with
    one point has blocks of length 1. The residuals are scaled up for the three fitted constants, and by the ratio of
    the quantiles of Student's t and of the normal distribution (both count blocks, not points): without it, intervals
    from 8 points cover about 80 %.

    Args:
        curves: the points of each run.
        replicates: resampled fits of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        The law with its intervals.

    Raises:
        CorpusError: there are fewer than 5 different values of compute.
    """
    curves = tuple(curves)
    points = _Points.of(curves)
    constants, delta = points.fit_twice()
    residuals = points.log_loss - points.predict(constants)
    draws = np.random.default_rng(seed).integers(0, points.n, size=(replicates, points.n))
    laws = []
    for draw in draws:
        resampled = points.predict(constants) + _resampled(residuals, draw, points.block)
        laws.append(points.law(points.fit(resampled, [constants], delta, _REPLICATE_STEPS)))
    law = points.law(constants)
    exponent = _estimate(law, laws, lambda each: each.exponent)
    floor = _estimate(law, laws, lambda each: each.floor)
    return ScalingFit(
        law=law,
        exponent=exponent,
        floor=floor,
        undetermined=tuple(_problems(points, constants, exponent, floor)),
        curves=curves,
        replicates=tuple(laws),
    )


def extrapolate(fit: ScalingFit, compute_flop: float) -> IntervalEstimate:
    """Returns the loss that the law expects, with the interval of its constants (not of a single run).

    Args:
        fit: a fitted law.
        compute_flop: training compute in FLOP.
    """
    return _estimate(fit.law, fit.replicates, lambda law: law.loss(compute_flop))


def compute_saved(fit: ScalingFit, baseline: ScalingFit, compute_flop: float) -> IntervalEstimate:
    """Returns how many times less compute a student needs than the baseline, at equal loss.

    Both are compared at the loss that the baseline's law predicts for `compute_flop`. 2.0 means half of the compute, a
    value below 1 means more compute, and 0 means that the student never reaches this loss.

    Args:
        fit: the law of the student.
        baseline: the law of the baseline; its losses are in the same unit, on the same text.
        compute_flop: training compute of the baseline in FLOP.
    """

    def times(of_student: ScalingLaw, of_baseline: ScalingLaw) -> float:
        return compute_flop / of_student.compute(of_baseline.loss(compute_flop))

    # Shifted by one: fits with the same seed draw the same residuals, and would otherwise move together.
    others = [*baseline.replicates[1:], *baseline.replicates[:1]]
    values = [times(*pair) for pair in zip(fit.replicates, others, strict=True)]
    return _with_interval(times(fit.law, baseline.law), values)


def _estimate(
    law: ScalingLaw, replicates: Sequence[ScalingLaw], value: Callable[[ScalingLaw], float]
) -> IntervalEstimate:
    return _with_interval(value(law), [value(replicate) for replicate in replicates])


def _with_interval(value: float, replicates: Sequence[float]) -> IntervalEstimate:
    low, high = np.quantile(replicates, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return IntervalEstimate(value=value, low=float(low), high=float(high))


def _resampled(residuals: np.ndarray, draw: np.ndarray, block: int) -> np.ndarray:
    """Residuals in blocks of neighbours, scaled up as `fit_law` says.

    Args:
        residuals: residuals of log(loss), shape (n,).
        draw: uniform numbers of residuals, shape (n,); the first n / block are the starts of the blocks.
        block: length of a block.
    """
    n = len(residuals)
    starts = draw[: math.ceil(n / block)]
    rows = ((starts[:, None] + np.arange(block)) % n).ravel()[:n]
    n_blocks, upper = n / block, (1 + COVERAGE) / 2
    free = max(1.0, n_blocks - _N_CONSTANTS)
    scale = math.sqrt(n_blocks / free) * stdtrit(free, upper) / ndtri(upper)
    return np.asarray((residuals - residuals.mean())[rows] * scale)


@dataclasses.dataclass(frozen=True)
class _Points:
    """All points of a fit, with log compute around its mean, so that the constants of the fit hardly correlate.

    A fit has the constants (log of A / C^alpha at the mean, log alpha, log floor): all three are positive.
    """

    log_compute: np.ndarray  # (n,) minus `center`
    log_loss: np.ndarray  # (n,)
    center: float
    block: int

    @classmethod
    def of(cls, curves: Sequence[LossCurve]) -> "_Points":
        log_compute = np.log([flop for curve in curves for flop in curve.compute_flop])
        if (distinct := len(set(log_compute))) < _FEWEST_COMPUTES:
            raise CorpusError(
                f"a scaling law has {_N_CONSTANTS} constants: expected losses at {_FEWEST_COMPUTES} or more different "
                f"values of compute, found {distinct}; train and evaluate runs of other lengths (train.steps)"
            )
        center = float(log_compute.mean())
        log_loss = np.log([loss for curve in curves for loss in curve.loss])
        block = max(1, round((len(log_loss) / len(curves)) ** (1 / 3)))
        return cls(log_compute - center, log_loss, center, block)

    @property
    def n(self) -> int:
        return len(self.log_loss)

    def predict(self, constants: np.ndarray) -> np.ndarray:
        """log(loss) of each point."""
        return np.logaddexp(constants[0] - math.exp(constants[1]) * self.log_compute, constants[2])

    def slopes(self, constants: np.ndarray) -> np.ndarray:
        """Derivatives of `predict`, shape (n, 3)."""
        exponent = math.exp(constants[1])
        share = np.exp(constants[0] - exponent * self.log_compute - self.predict(constants))
        return np.stack([share, -share * exponent * self.log_compute, 1 - share], axis=1)

    def starts(self) -> list[np.ndarray]:
        """Constants from which the fit starts: slow and fast laws, with low and high floors."""
        lowest, middle = self.log_loss.min(), math.exp(self.log_loss.mean())
        floors = [lowest + math.log(share) for share in (0.5, 0.8, 0.97)]
        rises = [math.log(middle - math.exp(floor)) for floor in floors]
        return [
            np.array([rise, math.log(exponent), floor])
            for exponent in (0.2, 0.6)
            for floor, rise in zip(floors, rises, strict=True)
        ]

    def fit_twice(self) -> tuple[np.ndarray, float]:
        """The constants of the points, and Huber's delta."""
        first = self.fit(self.log_loss, self.starts(), _FIRST_DELTA)
        scatter = float(np.median(np.abs(self.log_loss - self.predict(first)))) / _MEDIAN_IN_SCATTERS
        delta = max(_SMALLEST_DELTA, _DELTA_IN_SCATTERS * scatter)
        return self.fit(self.log_loss, [first], delta), delta

    def fit(
        self, log_loss: np.ndarray, starts: Sequence[np.ndarray], delta: float, steps: int | None = None
    ) -> np.ndarray:
        """Constants with the smallest Huber loss of the residuals of `log_loss`, from several starts."""
        fits = [
            least_squares(
                lambda constants: self.predict(constants) - log_loss,
                start,
                self.slopes,
                bounds=self.bounds(),
                loss="huber",
                f_scale=delta,
                ftol=1e-7,
                xtol=1e-7,
                max_nfev=steps,
            )
            for start in starts
        ]
        return np.asarray(min(fits, key=lambda fit: fit.cost).x)

    def bounds(self) -> tuple[list[float], list[float]]:
        """Lower and upper bounds of the constants. They keep a fit finite that the points do not determine."""
        lowest, highest = float(self.log_loss.min()), float(self.log_loss.max())
        return (
            [lowest - 20, math.log(_SMALLEST_EXPONENT), lowest - 20],
            [highest + 20, math.log(_LARGEST_EXPONENT), highest + 1],
        )

    def law(self, constants: np.ndarray) -> ScalingLaw:
        exponent = math.exp(constants[1])
        coefficient = math.exp(constants[0] + exponent * self.center)
        return ScalingLaw(coefficient=coefficient, exponent=exponent, floor=math.exp(constants[2]))


def _problems(points: _Points, constants: np.ndarray, exponent: IntervalEstimate, floor: IntervalEstimate) -> list[str]:
    """The reasons why the points do not determine the law."""
    problems = []
    losses = np.exp(points.predict(constants))
    fall = float(losses.max() - losses.min())
    residuals = points.log_loss - points.predict(constants)
    scatter = float(np.median(np.abs(residuals)) / _MEDIAN_IN_SCATTERS * losses.mean())
    if fall < _SMALLEST_FALL * scatter or fall <= 1e-6 * losses.max():
        problems.append(
            f"the loss falls by {fall:.2g} from the smallest to the largest compute, and scatters by {scatter:.2g} "
            "around the law: train runs that differ more in compute"
        )
        return problems  # then exponent and floor mean nothing
    if exponent.high - exponent.low > exponent.value or exponent.high > 0.99 * _LARGEST_EXPONENT:
        problems.append(
            f"the exponent may be anything from {exponent.low:.2g} to {exponent.high:.2g}: add runs, above all with "
            "more and with less compute"
        )
    if floor.value < _SMALLEST_FLOOR_SHARE * losses.min():
        problems.append(
            "the loss falls like a power of the compute up to the largest run, so the fit finds no floor: add runs "
            "with more compute"
        )
    elif floor.high - floor.low > fall:
        problems.append(
            f"the floor may be anything from {floor.low:.2f} to {floor.high:.2f}, which is more than the whole fall of "
            f"the loss ({fall:.2g}): add runs with more compute"
        )
    return problems
