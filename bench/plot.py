#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the benchmarks' JSON as one figure that reads on light and on dark pages.

    python3 bench/plot.py RESULT.json... FIGURE.svg

Left: cross-entropy (float, row-major) against the limits of the machine. Right: how much longer
others take. Both on logarithmic axes; every shape has its own band. What lies beyond the left axis
is written at its end: small problems fit the caches, where moving bytes takes next to no time.
"""
import json
import re
import sys

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from figure import FAINT, TEXT, save

MODES = {"value": ("value", "#2f88d8"),
         "gradient": ("value and gradient", "#d9761a"),
         "in_place": ("value and gradient, in place", "#2a9d6c")}
PEERS = {"PyTorch": "#e05265", "oneDNN": "#9a6fd8", "Eigen": "#a98a1f"}
BEYOND = 3  # times the limit: the left axis ends here
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def read(paths):
    """{(shape, mode or peer, threads): ratio}, for the left and for the right panel."""
    limits, peers = {}, {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            benchmarks = json.load(file)["benchmarks"]
        for b in benchmarks:
            if b.get("error_occurred"):
                print(f"plot.py: left out {b['name']}: {b['error_message']}", file=sys.stderr)
                continue
            ours = re.match(r"cross_entropy/float/row/(\d+x\d+)/(\w+)/threads:(\d+)", b["name"])
            peer = re.match(r"peer/([^/]+)/(\d+x\d+)/threads:(\d+)", b["name"])
            if ours:
                shape, mode, threads = ours.groups()
                limits[shape, mode, int(threads)] = b["x_limit"]
            elif peer:
                name, shape, threads = peer.groups()
                peers[shape, name.replace("_", " "), int(threads)] = b["x_ours"]
    return limits, peers


def size(shape):
    rows, cols = map(int, shape.split("x"))
    return cols, rows


def draw(axes, ratios, shapes, colours, end=float("inf")):
    """One band per shape, one line per key of `colours`: filled is one thread, hollow is two."""
    step = 0.72 / max(len(colours), 1)
    for band, shape in enumerate(shapes):
        for lane, (name, colour) in enumerate(colours.items()):
            y = band + (lane - (len(colours) - 1) / 2) * step
            mine = {n: ratios[shape, name, n] for n in (1, 2) if (shape, name, n) in ratios}
            inside = {n: r for n, r in mine.items() if r <= end}
            for threads, ratio in inside.items():
                axes.plot(ratio, y, linestyle="none", marker="o", markersize=6.5, markeredgewidth=1.6,
                          markeredgecolor=colour, markerfacecolor=colour if threads == 1 else "none",
                          zorder=3)
            if inside:  # a thin line joins the two, so that they are read as a pair
                stop = end if len(inside) == len(mine) else end * 0.82  # leaves room for the text
                ends = [min(r, max(stop, *inside.values(), 0)) for r in mine.values()]
                axes.plot(ends, [y, y], color=colour, linewidth=1.2, alpha=0.5, zorder=2)
            outside = " / ".join(f"{r:.2g}×" if r < 100 else f"{r:.0f}×"
                                 for n, r in mine.items() if n not in inside)
            if outside:
                axes.annotate(outside + " →", (1, y), xycoords=("axes fraction", "data"),
                              xytext=(-4, 0), textcoords="offset points", ha="right",
                              va="center", fontsize=8.5, color=colour, fontweight="bold",
                              zorder=4)


def frame(axes, ratios, title, what, end=float("inf")):
    low, high = min([*ratios.values(), 1]), max([*ratios.values(), 2])
    low, high = min(low, end), min(high, end)
    span = (high / low) ** 0.06
    low, high = low / span, high * span
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [t for t in TICKS if low <= t <= high]
    if high / low > 12:  # too many to stand side by side
        ticks = [t for t in ticks if t not in (1.2, 1.5, 3)]
    if high / low > 120:
        ticks = [t for t in ticks if t in (1, 10, 100, 1000)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.grid(axis="x", color=FAINT, alpha=0.3, linewidth=0.8)
    axes.axvline(1, color=TEXT, linewidth=1.6, zorder=1)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.text(0, 1.025, what, transform=axes.transAxes, fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def legend(axes, entries):
    def row(handles, y):
        return axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, y), ncol=4,
                           frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.2)

    def mark(colour, text, fill):
        return Line2D([], [], marker="o", linestyle="none", label=text, markeredgecolor=colour,
                      markerfacecolor=fill)

    axes.add_artist(row([mark(c, t, c) for t, c in entries], -0.065))
    row([mark(TEXT, "1 thread", TEXT), mark(TEXT, "2 threads", "none")], -0.115)


def main():
    *inputs, output = sys.argv[1:]
    if not inputs:
        sys.exit(__doc__)
    limits, peers = read(inputs)
    shapes = sorted({key[0] for key in (*limits, *peers)}, key=size)
    if not shapes:
        sys.exit("plot.py: no results of cross-entropy in " + ", ".join(inputs))

    figure, panels = pyplot.subplots(1, 2 if peers else 1, sharey=True, squeeze=False,
                                     figsize=(11 if peers else 6.5, 1.6 + 0.62 * len(shapes)))
    left = panels[0][0]
    modes = {m: colour for m, (_, colour) in MODES.items()}
    draw(left, limits, shapes, modes, BEYOND)
    frame(left, limits, "Cross-entropy against the machine",
          "time ÷ time of moving the same bytes: 1× is the limit", BEYOND)
    legend(left, MODES.values())
    if peers:
        right = panels[0][1]
        names = sorted({key[1] for key in peers},
                       key=lambda n: [n.startswith(p) for p in PEERS].index(True))
        colours = {n: next(c for p, c in PEERS.items() if n.startswith(p)) for n in names}
        draw(right, peers, shapes, colours)
        frame(right, peers, "Others, value and gradient", "time ÷ time of Perdita")
        legend(right, colours.items())

    left.set_yticks(range(len(shapes)))
    left.set_yticklabels([f"{int(r):,} × {int(c):,}".replace(",", "\u2009")
                          for r, c in (s.split("x") for s in shapes)])
    left.set_ylim(len(shapes) - 0.5, -0.5)
    for axes in panels[0]:
        for i in range(0, len(shapes), 2):
            axes.axhspan(i - 0.5, i + 0.5, color=FAINT, alpha=0.1, linewidth=0)
    left.text(-0.02, 1.025, "rows × classes", transform=left.transAxes, ha="right", fontsize=9)

    figure.tight_layout(w_pad=2.5)
    save(figure, output)


if __name__ == "__main__":
    main()
