"""The report's figures: plain numbers in, inline SVG out. Driver only; no pyplot, so no global state and no display.

Inputs: the dataclasses of queries.py and students.py. Outputs: two `<svg>` elements as markup, of which the page shows
one: a wide figure, or on a phone a narrow one with letters of the same size. They are deterministic, with text as text
(the page's fonts), no namespace, no metadata and no link, so that the page stays self-contained. Colours are variables
of the page's style sheet, which has one set for light and one for dark pages: Okabe and Ito's, which colour-blind
readers can distinguish; lines also differ by their dashes. Names from the corpus (sources) are never read as
mathematics.
"""

import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from miniplm_udf.report.histogram import Histogram
from miniplm_udf.report.queries import SourceShare
from miniplm_udf.report.students import StudentFacts

KEPT, DROPPED, CUT, INK = "#0072B2", "#C9CED6", "#D55E00", "#3B4252"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
_EDGE, _GRID = "#9AA3B2", "#ECEFF4"
# The variable of the style sheet in report.html.j2 that replaces each colour.
_VARIABLES = {
    KEPT: "kept", DROPPED: "dropped", CUT: "cut", INK: "ink", _EDGE: "edge", _GRID: "grid",
    **{color: f"series-{index}" for index, color in enumerate(LINES) if color not in (KEPT, CUT)},
}  # fmt: skip
_WIDE_INCHES, _NARROW_INCHES = 9.2, 4.1

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": _EDGE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvas:
    """An empty figure, and whether it is the narrow one."""

    figure: Figure
    is_narrow: bool

    def label(self, text: str) -> str:
        """Returns the label of an axis: cut at 90 characters, on a narrow figure in lines of 44.

        Args:
            text: the label.
        """
        text = text if len(text) <= 90 else text[:87] + "…"
        return textwrap.fill(text, 44) if self.is_narrow else text

    def name(self, text: str) -> str:
        """Returns a name for the ticks of an axis, cut at 40 characters, on a narrow figure at 18.

        Args:
            text: the name.
        """
        longest = 18 if self.is_narrow else 40
        return text if len(text) <= longest else text[: longest - 1] + "…"

    def legend(self, axes: Axes) -> None:
        """Adds a legend: inside the axes, on a narrow figure above them, where it hides nothing.

        Args:
            axes: the axes whose parts have labels.
        """
        if self.is_narrow:
            self.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        else:
            axes.legend(loc="upper right")


def _figure(draw: Callable[[Canvas], None], heights: tuple[float, float], label: str) -> Markup:
    """Draws the wide and the narrow figure.

    Args:
        draw: draws on an empty figure.
        heights: inches of the wide and of the narrow figure.
        label: a description for screen readers.
    """
    wide = _svg(draw, (_WIDE_INCHES, heights[0]), label, is_narrow=False)
    return wide + _svg(draw, (_NARROW_INCHES, heights[1]), label, is_narrow=True)


def _svg(draw: Callable[[Canvas], None], size: tuple[float, float], label: str, is_narrow: bool) -> Markup:
    """Draws one figure in the report's style; `label` and the width keep the ids of two figures apart."""
    kind = "narrow" if is_narrow else "wide"
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{kind} {label}"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(Canvas(figure=figure, is_narrow=is_narrow))
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    for color, variable in _VARIABLES.items():
        svg = re.sub(rf"(fill|stroke): {color}\b", rf"\1: var(--{variable})", svg, flags=re.IGNORECASE)
    # matplotlib names DejaVu Sans first; the page's own font is easier to read and always available.
    svg = svg.replace("'DejaVu Sans', ", "")
    return Markup(svg.replace("<svg", f'<svg class="{kind}" role="img" aria-label="{Markup.escape(label)}"', 1))


def _bars(axes: Axes, shown: Histogram) -> int:
    """Draws the kept rows and stacks the dropped rows on them; returns the highest count."""
    width = (shown.high - shown.low) / len(shown.kept)
    edges = [shown.low + i * width for i in range(len(shown.kept) + 1)]
    both = [kept + dropped for kept, dropped in zip(shown.kept, shown.dropped, strict=True)]
    axes.stairs(shown.kept, edges, fill=True, color=KEPT, label="kept", linewidth=0)
    axes.stairs(both, edges, baseline=shown.kept, fill=True, color=DROPPED, label="dropped", linewidth=0)
    axes.set_xlim(shown.low, shown.high)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return max(both)


def _shown(counted: Histogram) -> Histogram:
    """The histogram with 64 bars, or with 32 for few rows."""
    return counted.coarser(64 if sum(counted.kept) + sum(counted.dropped) >= 2000 else 32)


def _outside(text: str, counted: Histogram) -> str:
    outside = counted.n_below + counted.n_above
    return f"{text} ({outside:,} outside the axis)" if outside else text


def _score_label(expression: str) -> str:
    """The expression, with its unit if it is a sum or a difference of means per token."""
    is_mean = re.fullmatch(r"\w+_nll_mean( [-+] \w+_nll_mean)*", expression)
    return f"score, nats per token: {expression}" if is_mean else f"score: {expression}"


def score_histogram(counted: Histogram, expression: str, cut: float | None) -> Markup:
    """Draws the candidates by score: kept rows, dropped rows stacked on them, and the cut as a line.

    Args:
        counted: counts by score.
        expression: the SQL of the score, for the label of the axis.
        cut: the score of the cut; None, or a score outside the histogram, draws no line.

    Returns:
        The figure as SVG, wide and narrow.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        axes.set_ylim(0, 1.06 * max(1, _bars(axes, _shown(counted))))
        if cut is not None and counted.low <= cut <= counted.high:
            axes.axvline(cut, color=CUT, linewidth=1.6, linestyle=(0, (4, 2)), label=f"cut at {cut:.4g}")
        axes.set_xlabel(canvas.label(_outside(_score_label(expression), counted)))
        axes.set_ylabel("instances")
        canvas.legend(axes)

    return _figure(draw, (2.9, 2.9), f"Histogram of the score {expression}")


def nll_histograms(counted: dict[str, Histogram]) -> Markup:
    """Draws the candidates by mean negative log-likelihood (nats per token).

    Args:
        counted: counts by model alias, at least one model.

    Returns:
        The figure as SVG, wide and narrow: one panel per model, with one axis range so that models compare.
    """
    low, high = min(h.low for h in counted.values()), max(h.high for h in counted.values())

    def draw(canvas: Canvas) -> None:
        shape = (len(counted), 1) if canvas.is_narrow else (1, len(counted))
        panels = canvas.figure.subplots(*shape, squeeze=False, sharey=True, sharex=canvas.is_narrow).ravel()
        highest = 1
        for axes, (alias, histogram) in zip(panels, counted.items(), strict=True):
            highest = max(highest, _bars(axes, _shown(histogram)))
            axes.set_title(canvas.name(alias), fontsize=10, loc="left")
            axes.set_ylabel("instances")
            axes.set_xlabel(canvas.label(_outside("mean NLL, nats per token", histogram)))
            axes.label_outer()
        for axes in panels:
            axes.set_xlim(low, high)
        panels[0].set_ylim(0, 1.06 * highest)
        canvas.legend(panels[-1])

    label = "Histograms of mean negative log-likelihood: " + ", ".join(counted)
    return _figure(draw, (2.5, 0.7 + 1.6 * len(counted)), label)


def kept_shares(shares: Sequence[SourceShare], overall: float) -> Markup:
    """Draws one bar per source: the share of its candidates that was kept; and the overall share as a line.

    Args:
        shares: the sources, the first at the top.
        overall: the share over all sources, from 0 to 1.

    Returns:
        The figure as SVG, wide and narrow.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        rows = list(range(len(shares)))
        axes.barh(rows, [1.0] * len(rows), 0.66, color=DROPPED, alpha=0.5, linewidth=0)
        axes.barh(rows, [share.kept_share for share in shares], 0.66, color=KEPT, linewidth=0)
        for row, share in zip(rows, shares, strict=True):
            axes.text(1.01, row, f"{share.kept_share:.0%}", va="center")
        axes.axvline(overall, color=INK, linewidth=1.1, linestyle=(0, (2, 2)))
        axes.set_yticks(rows, [canvas.name(share.source) for share in shares])
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        axes.set_xlabel(canvas.label(f"share of instances kept (dotted: {overall:.0%} overall)"))

    height = 0.85 + 0.29 * len(shares)
    return _figure(draw, (height, height), "Share of instances kept per source")


def training_curves(students: Sequence[StudentFacts]) -> Markup:
    """Draws the training loss (nats per token) by step, one line per student.

    Args:
        students: students that have a curve.

    Returns:
        The figure as SVG, wide and narrow.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        for index, student in enumerate(students):
            steps, losses = zip(*student.curve, strict=True)
            color, dash = LINES[index % len(LINES)], DASHES[index % len(DASHES)]
            axes.plot(steps, losses, color=color, linestyle=dash, linewidth=1.7, label=student.name)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("training loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        canvas.legend(axes)

    rows = 0.2 * math.ceil(len(students) / 3)  # of the narrow figure's legend
    return _figure(draw, (3.1, 2.8 + rows), "Training loss of " + ", ".join(student.name for student in students))


def heldout_bars(students: Sequence[StudentFacts], sources: Sequence[str]) -> Markup:
    """Draws the held-out bits per byte by source, one bar per student in each group.

    Args:
        students: at least one student. A student has no bar for a source on which it was not evaluated.
        sources: the sources, the first at the top.

    Returns:
        The figure as SVG, wide and narrow.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        height = 0.8 / len(students)
        for index, student in enumerate(students):
            values = [student.source_bits_per_byte(source) for source in sources]
            rows = [row + (index - (len(students) - 1) / 2) * height for row in range(len(sources))]
            widths = [math.nan if value is None else value for value in values]
            axes.barh(rows, widths, height * 0.9, color=LINES[index % len(LINES)], label=student.name, linewidth=0)
        axes.set_yticks(range(len(sources)), [canvas.name(source) for source in sources])
        axes.invert_yaxis()
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel("held-out bits per byte (lower is better)")
        canvas.figure.legend(loc="outside upper left", ncols=2 if canvas.is_narrow else min(len(students), 6))

    height = 1.1 + (0.12 + 0.2 * len(students)) * len(sources)
    legend = 0.2 * math.ceil(len(students) / 2)
    return _figure(draw, (height, height + legend), "Held-out bits per byte per source")
