# SPDX-License-Identifier: MIT
"""What the figures of the benchmarks have in common: they read on light and on dark pages, and the
same numbers make the same bytes."""
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Tones in the middle: each has a contrast of 3 or more with white and with near-black.
TEXT, FAINT = "#77808a", "#8b949e"

pyplot.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "perdita",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT})


def spaced(n):
    return f"{n:,}".replace(",", "\u2009")


def title(axes, text, what):
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.text(0, 1.02, what, transform=axes.transAxes, fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def save(figure, output):
    metadata = {"Date": None} if output.endswith(".svg") else None
    figure.savefig(output, transparent=True, bbox_inches="tight", metadata=metadata)
