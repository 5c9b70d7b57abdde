"""The report's figures: plain numbers in, inline SVG out. Driver only; no pyplot, so no global state and no display.

Inputs: the dataclasses of queries.py and students.py. Outputs: `<svg>` elements as markup, deterministic, with text as
text (the page's fonts), no namespace, no metadata and no link, so that the page stays self-contained. Colours are
Okabe and Ito's, which colour-blind readers can distinguish; lines also differ by their dashes. Names from the corpus
(sources) are never read as mathematics.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

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

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#9AA3B2",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#ECEFF4",
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "legend.frameon": False,
}


def _svg(draw: Any, size: tuple[float, float], label: str) -> Markup:
    """Runs `draw(figure)` in the report's style; `label` is for screen readers, and keeps ids of two figures apart."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    # matplotlib names DejaVu Sans first; the page's own font is easier to read and always available.
    svg = svg.replace("'DejaVu Sans', ", "")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1))


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


def _axis_label(text: str, counted: Histogram) -> str:
    outside = counted.n_below + counted.n_above
    text = text if len(text) <= 90 else text[:87] + "…"
    return f"{text}   ({outside:,} outside the axis)" if outside else text


def score_histogram(counted: Histogram, expression: str, cut: float | None) -> Markup:
    """Draws the candidates by score: kept rows, dropped rows stacked on them, and the cut as a line.

    Args:
        counted: counts by score.
        expression: the SQL of the score, for the label of the axis.
        cut: the score of the cut; None, or a score outside the histogram, draws no line.

    Returns:
        The figure as SVG.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_ylim(0, 1.06 * max(1, _bars(axes, _shown(counted))))
        if cut is not None and counted.low <= cut <= counted.high:
            axes.axvline(cut, color=CUT, linewidth=1.6, linestyle=(0, (4, 2)), label=f"cut at {cut:.4g}")
        axes.set_xlabel(_axis_label(f"score: {expression}", counted))
        axes.set_ylabel("instances")
        axes.legend(loc="upper right")

    return _svg(draw, (9.2, 2.9), f"Histogram of the score {expression}")


def nll_histograms(counted: dict[str, Histogram]) -> Markup:
    """Draws the candidates by mean negative log-likelihood (nats per token).

    Args:
        counted: counts by model alias, at least one model.

    Returns:
        The figure as SVG: one panel per model, with one axis range so that models compare.
    """
    low, high = min(h.low for h in counted.values()), max(h.high for h in counted.values())

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(counted), squeeze=False, sharey=True)[0]
        highest = 1
        for axes, (alias, histogram) in zip(panels, counted.items(), strict=True):
            highest = max(highest, _bars(axes, _shown(histogram)))
            axes.set_xlim(low, high)
            axes.set_title(alias, fontsize=10, loc="left")
            axes.set_xlabel(_axis_label("mean NLL, nats per token", histogram))
        panels[0].set_ylim(0, 1.06 * highest)
        panels[0].set_ylabel("instances")
        panels[-1].legend(loc="upper right")

    return _svg(draw, (9.2, 2.5), "Histograms of mean negative log-likelihood: " + ", ".join(counted))


def kept_shares(shares: Sequence[SourceShare], overall: float) -> Markup:
    """Draws one bar per source: the share of its candidates that was kept; and the overall share as a line.

    Args:
        shares: the sources, the first at the top.
        overall: the share over all sources, from 0 to 1.

    Returns:
        The figure as SVG.
    """
    names = [share.source if len(share.source) <= 40 else share.source[:39] + "…" for share in shares]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = list(range(len(shares)))
        axes.barh(rows, [1.0] * len(rows), 0.66, color=DROPPED, alpha=0.5, linewidth=0)
        axes.barh(rows, [share.kept_share for share in shares], 0.66, color=KEPT, linewidth=0)
        for row, share in zip(rows, shares, strict=True):
            axes.text(1.01, row, f"{share.kept_share:.0%}", va="center")
        axes.axvline(overall, color=INK, linewidth=1.1, linestyle=(0, (2, 2)))
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        axes.set_xlabel(f"share of instances kept (dotted: {overall:.0%} overall)")

    return _svg(draw, (9.2, 0.85 + 0.29 * len(shares)), "Share of instances kept per source")


def training_curves(students: Sequence[StudentFacts]) -> Markup:
    """Draws the training loss (nats per token) by step, one line per student.

    Args:
        students: students that have a curve.

    Returns:
        The figure as SVG.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, student in enumerate(students):
            steps, losses = zip(*student.curve, strict=True)
            color, dash = LINES[index % len(LINES)], DASHES[index % len(DASHES)]
            axes.plot(steps, losses, color=color, linestyle=dash, linewidth=1.7, label=student.name)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("training loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.legend(loc="upper right")

    return _svg(draw, (9.2, 3.1), "Training loss of " + ", ".join(student.name for student in students))


def heldout_bars(students: Sequence[StudentFacts], sources: Sequence[str]) -> Markup:
    """Draws the held-out bits per byte by source, one bar per student in each group.

    Args:
        students: at least one student. A student has no bar for a source on which it was not evaluated.
        sources: the sources, the first at the top.

    Returns:
        The figure as SVG.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        height = 0.8 / len(students)
        for index, student in enumerate(students):
            values = [student.source_bits_per_byte(source) for source in sources]
            rows = [row + (index - (len(students) - 1) / 2) * height for row in range(len(sources))]
            widths = [math.nan if value is None else value for value in values]
            axes.barh(rows, widths, height * 0.9, color=LINES[index % len(LINES)], label=student.name, linewidth=0)
        axes.set_yticks(range(len(sources)), [source[:40] for source in sources])
        axes.invert_yaxis()
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel("held-out bits per byte (lower is better)")
        figure.legend(loc="outside upper left", ncols=min(len(students), 6))

    return _svg(draw, (9.2, 1.1 + (0.12 + 0.2 * len(students)) * len(sources)), "Held-out bits per byte per source")
