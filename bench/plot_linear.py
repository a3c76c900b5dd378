#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the linear head's benchmarks as one figure that reads on light and on dark pages.

    python3 bench/plot_linear.py RESULT.json... FIGURE.svg

Left: the share of the multiply-add peak that the named shapes reach, and that the same loss by way
of all scores reaches (useful operations of both: 2, 6 and 6 N D V). Right: for each problem of the
map the time of the four ways to value and gradients, divided by that of the best of them.
"""
import json
import re
import sys

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from figure import FAINT, TEXT, save, spaced, title

MODES = {"value": "#2f88d8", "roomy": "#d9761a", "tight": "#2a9d6c"}
OTHERS = {"x_materialised": ("all scores, same products", "#9a6fd8"),
          "x_eigen": ("all scores, Eigen's products", "#a98a1f")}
WAYS = {"roomy": "roomy", "tight": "tight", "materialised": "all scores", "eigen": "Eigen"}
# Green is the best way, and what costs next to nothing; red is what to stay away from.
STEPS = ((1.05, "#2a9d6c", 0.85), (1.2, "#2a9d6c", 0.35), (1.6, "#d9a11a", 0.35),
         (2.5, "#d9761a", 0.6), (float("inf"), "#e05265", 0.8))


def numbers(shape):
    return [int(n) for n in shape.split("x")]


def read(paths):
    """{(shape, mode, threads): counters} of the named shapes, {(shape, threads): ...} of the map."""
    named, cells = {}, {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            benchmarks = json.load(file)["benchmarks"]
        for b in benchmarks:
            if b.get("error_occurred"):
                print(f"plot_linear.py: left out {b['name']}: {b['error_message']}",
                      file=sys.stderr)
                continue
            shape = re.match(r"linear/float/([\dx]+)/(\w+)/threads:(\d+)", b["name"])
            cell = re.match(r"map/([\dx]+)/threads:(\d+)", b["name"])
            if shape:
                named[shape[1], shape[2], int(shape[3])] = b
            elif cell:
                cells[cell[1], int(cell[2])] = b
    return named, cells


def draw_peak(axes, named):
    shapes = sorted({key[0] for key in named}, key=lambda s: numbers(s)[2])
    lines = [(s, m) for s in shapes for m in MODES]
    for y, (shape, mode) in enumerate(lines):
        for threads in (1, 2):
            b = named.get((shape, mode, threads))
            if not b:
                continue
            x = b["x_peak"]
            useful = x * (0.75 if mode == "tight" else 1)  # as others count
            for key, (_, colour) in OTHERS.items():
                if mode != "tight" and key in b:
                    axes.plot(useful / b[key], y, linestyle="none", marker="|", markersize=13,
                              markeredgewidth=2 if threads == 1 else 1.2, color=colour, zorder=2)
            axes.plot(x, y, linestyle="none", marker="o", markersize=6.5, markeredgewidth=1.6,
                      markeredgecolor=MODES[mode],
                      markerfacecolor=MODES[mode] if threads == 1 else "none", zorder=3)
    axes.set_yticks(range(len(lines)))
    axes.set_yticklabels([mode for _, mode in lines], fontsize=9)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    for i, shape in enumerate(shapes):
        top = 3 * i - 0.5
        if i % 2 == 0:
            axes.axhspan(top, top + 3, color=FAINT, alpha=0.1, linewidth=0)
        axes.text(0.35, top + 0.12, " × ".join(spaced(n) for n in numbers(shape)), fontsize=8.5,
                  va="top", transform=axes.get_yaxis_transform(), fontweight="bold")
    low = min([n["x_peak"] for n in named.values()] + [0.5])
    axes.set_xlim(min(0.4, low - 0.05), 1.02)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.grid(axis="x", color=FAINT, alpha=0.3, linewidth=0.8)
    axes.axvline(1, color=TEXT, linewidth=1.6, zorder=1)
    entries = [Line2D([], [], marker="o", linestyle="none", color=TEXT, label="1 thread"),
               Line2D([], [], marker="o", linestyle="none", color=TEXT, markerfacecolor="none",
                      label="2 threads")]
    entries += [Line2D([], [], marker="|", markersize=11, markeredgewidth=2, linestyle="none",
                       color=c, label=t) for t, c in OTHERS.values()]
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(-0.1, -0.06), ncol=2,
                frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.2)
    title(axes, "The linear head against the machine",
          "share of the multiply-add peak; rows × features × classes")


def draw_map(axes, cells, threads):
    mine = {shape: b for (shape, n), b in cells.items() if n == threads}
    rows, features, classes = (sorted({numbers(s)[i] for s in mine}) for i in range(3))
    for i, n in enumerate(rows):
        for j, d in enumerate(features):
            for k, v in enumerate(classes):
                b = mine.get(f"{n}x{d}x{v}")
                for w, way in enumerate(WAYS):
                    x = len(WAYS) * k + w + 0.4 * k
                    y = len(features) * i + j + 0.4 * i
                    if not b:
                        continue
                    ratio = b[way]
                    _, colour, alpha = next(s for s in STEPS if ratio <= s[0])
                    axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, linewidth=0,
                                             facecolor=colour, alpha=alpha))
                    axes.text(x + 0.5, y + 0.52, f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}",
                              ha="center", va="center", fontsize=7.5,
                              fontweight="bold" if ratio == 1 else "normal",
                              color="#ffffff" if alpha > 0.5 else TEXT)
    width = (len(WAYS) + 0.4) * len(classes) - 0.4
    height = (len(features) + 0.4) * len(rows) - 0.4
    for k, v in enumerate(classes):
        middle = (len(WAYS) + 0.4) * k + len(WAYS) / 2
        axes.text(middle, -0.85, f"{spaced(v)} classes", ha="center", va="bottom", fontsize=9,
                  fontweight="bold")
        for w, what in enumerate(WAYS.values()):
            axes.text((len(WAYS) + 0.4) * k + w + 0.5, -0.15, what, ha="center", va="bottom",
                      fontsize=6.8)
    for i, n in enumerate(rows):
        for j, d in enumerate(features):
            y = (len(features) + 0.4) * i + j + 0.52
            axes.text(-0.15, y, spaced(d), ha="right", va="center", fontsize=8.5)
        axes.text(-1.25, (len(features) + 0.4) * i + len(features) / 2,
                  f"{spaced(n)} row" + ("s" if n > 1 else ""), ha="right", va="center", fontsize=9,
                  fontweight="bold")
    axes.text(-0.15, -0.2, "features", ha="right", va="bottom", fontsize=7.5)
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(height + 0.1, -1.5)
    axes.set_xticks([])
    axes.set_yticks([])
    title(axes, f"Which way when: value and gradients, {threads} thread" + "s" * (threads > 1),
          "time ÷ time of the best of the four; the best is bold")


def main():
    *inputs, output = sys.argv[1:]
    if not inputs:
        sys.exit(__doc__)
    named, cells = read(inputs)
    if not named or not cells:
        sys.exit("plot_linear.py: no results of the linear head in " + ", ".join(inputs))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13.5, 6),
                                            gridspec_kw={"width_ratios": [1, 1.75]})
    draw_peak(left, named)
    draw_map(right, cells, max(n for _, n in cells))
    figure.tight_layout(w_pad=4)
    save(figure, output)


if __name__ == "__main__":
    main()
