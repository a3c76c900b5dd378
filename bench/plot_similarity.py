#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws how losses of embeddings scale as one figure that reads on light and on dark pages.

    python3 bench/plot_similarity.py RESULT.json... FIGURE.svg

Left: time ÷ rows², relative to that of the fewest rows. Right: by how much the peak of the resident
memory grows, and what the matrix of scores would take.
"""
import json
import re
import sys

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from figure import FAINT, TEXT, save, spaced, title

WAYS = {"head": ("similarity head, InfoNCE", "#2f88d8"),
        "clip": ("similarity head, CLIP", "#d9761a"),
        "sup_con": ("anchors, SupCon", "#2a9d6c")}
UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"))
WITHIN = 0.1  # what counts as quadratic


def amount(n, _=None):
    for power, unit in UNITS:
        if n >= 2**power:
            return f"{n / 2**power:.3g} {unit}"
    return f"{n:.0f} B"


def read(paths):
    """{(way, threads): {rows: counters}} and how many features the embeddings have."""
    lines, features = {}, None
    for path in paths:
        with open(path, encoding="utf-8") as file:
            benchmarks = json.load(file)["benchmarks"]
        for b in benchmarks:
            match = re.match(r"scaling/(\w+)/(\d+)x(\d+)/threads:(\d+)", b["name"])
            if not match:
                continue
            if b.get("error_occurred"):
                print(f"plot_similarity.py: left out {b['name']}: {b['error_message']}",
                      file=sys.stderr)
                continue
            lines.setdefault((match[1], int(match[4])), {})[int(match[2])] = b
            features = match[3]
    return lines, features


def draw_lines(axes, lines, value):
    for (way, threads), points in sorted(lines.items()):
        rows = sorted(points)
        _, colour = WAYS[way]
        axes.plot(rows, [value(points[r]) for r in rows], color=colour, linewidth=1.6,
                  linestyle="-" if threads == 1 else (0, (1, 1.5)), marker="o", markersize=6.5,
                  markeredgewidth=1.6, markerfacecolor=colour if threads == 1 else "none",
                  zorder=3)


def rows_axis(axes, rows):
    axes.set_xscale("log", base=2)
    axes.set_xlim(rows[0] / 2**0.25, rows[-1] * 2**0.25)
    axes.xaxis.set_major_locator(FixedLocator(rows))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda n, _: spaced(round(n)))
    axes.set_xlabel("rows")
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.8)


def draw_time(axes, lines, rows):
    axes.axhspan(1 - WITHIN, 1 + WITHIN, color=FAINT, alpha=0.15, linewidth=0)
    axes.axhline(1, color=TEXT, linewidth=1.6, zorder=1)
    draw_lines(axes, lines, lambda b: b["x_quadratic"])
    values = [b["x_quadratic"] for points in lines.values() for b in points.values()]
    axes.set_ylim(min(0.8, min(values) - 0.05), max(1.2, max(values) + 0.05))
    rows_axis(axes, rows)
    axes.text(rows[0] / 2**0.2, 1 + WITHIN, " ± 10 %", fontsize=8.5, va="bottom")
    title(axes, "Time against rows × rows",
          f"time ÷ rows², that of {spaced(rows[0])} rows being 1")


def draw_memory(axes, lines, rows):
    draw_lines(axes, lines, lambda b: b["extra_bytes"] if b["extra_bytes"] > 0 else float("nan"))
    matrix = [4 * n * n for n in rows]
    axes.plot(rows, matrix, color=TEXT, linewidth=1.6, linestyle="--", zorder=2)
    axes.text(rows[-1], matrix[-1], "the matrix of scores ", fontsize=9, ha="right", va="bottom")
    rows_axis(axes, rows)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=4, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(amount)
    title(axes, "Memory beyond embeddings and gradients",
          "growth of the peak of resident memory during a call")


def legend(figure, lines, features):
    entries = [Line2D([], [], color=colour, linewidth=3, label=label)
               for way, (label, colour) in WAYS.items() if any(w == way for w, _ in lines)]
    for n in sorted({threads for _, threads in lines}):
        entries.append(Line2D([], [], color=TEXT, marker="o", markersize=6.5, markeredgewidth=1.6,
                              markerfacecolor=TEXT if n == 1 else "none",
                              linestyle="-" if n == 1 else (0, (1, 1.5)),
                              label=f"{n} thread" + "s" * (n > 1)))
    figure.legend(handles=entries, loc="lower center", ncol=len(entries), frameon=False, fontsize=9,
                  handletextpad=0.5, columnspacing=1.6, bbox_to_anchor=(0.5, -0.07),
                  title=f"value and gradients, {features} features", title_fontsize=9)


def main():
    *inputs, output = sys.argv[1:]
    if not inputs:
        sys.exit(__doc__)
    lines, features = read(inputs)
    if not lines:
        sys.exit("plot_similarity.py: no scaling in " + ", ".join(inputs))
    rows = sorted({n for points in lines.values() for n in points})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    draw_time(left, lines, rows)
    draw_memory(right, lines, rows)
    figure.tight_layout(w_pad=4)
    legend(figure, lines, features)
    save(figure, output)


if __name__ == "__main__":
    main()
