"""Draws scaling laws: the points and the curve of each law, with its 90 % interval, as a PNG file.

Input: the fits by name, one unit of loss for all. Output: the file; the same fits give the same picture. No pyplot, so
no global state and no display. Colours are Okabe and Ito's, as in the report; lines also differ by their dashes.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.scaling.laws import ScalingFit, extrapolate

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_CURVE_POINTS = 100


def draw_laws(fits: Mapping[str, ScalingFit], loss_name: str, largest_flop: float, path: Path) -> None:
    """Draws the laws in one picture. A law that its points do not determine has only its points.

    Args:
        fits: the laws by name.
        loss_name: name of the loss, with its unit, for the axis.
        largest_flop: compute at which the curves end, in FLOP; they reach to the largest point in any case.
        path: PNG file; its folder is created.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="training compute in FLOP", ylabel=loss_name)
    largest = max(largest_flop, *(fit.largest_flop for fit in fits.values()))
    for (name, fit), colour, dashes in zip(fits.items(), itertools.cycle(_COLOURS), itertools.cycle(_DASHES)):
        flop = [point for curve in fit.curves for point in curve.compute_flop]
        loss = [point for curve in fit.curves for point in curve.loss]
        label = f"{name} (undetermined)" if fit.undetermined else name
        axes.scatter(flop, loss, s=12, color=colour, label=label)
        if fit.undetermined:
            continue
        grid = np.geomspace(min(flop), largest, _CURVE_POINTS)
        estimates = [extrapolate(fit, compute) for compute in grid]
        axes.plot(grid, [estimate.value for estimate in estimates], color=colour, linestyle=dashes, linewidth=1.5)
        ends = ([estimate.low for estimate in estimates], [estimate.high for estimate in estimates])
        axes.fill_between(grid, *ends, color=colour, alpha=0.15, linewidth=0)
    axes.grid(color="#ECEFF4")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
