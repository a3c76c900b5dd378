// SPDX-License-Identifier: MIT
#pragma once

/// A figure of a few lines, as SVG.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

struct chart_line {
  std::string name;
  std::vector<double> values; // at 1, 2, 3, …
};

/// Values from `low` to `high`, with a line and a number at every `step`. The first value of a line
/// is at `first`, the next `every` later, and so on.
inline void write_chart(const std::string& path, const std::string& title, const std::string& below,
                        const std::vector<chart_line>& lines, double low, double high, double step,
                        int first = 1, int every = 1) {
  constexpr int width = 720, height = 420, left = 56, right = 150, top = 40, bottom = 48;
  constexpr const char* colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                     "#8c6d00", "#56b4e9", "#444444"}; // Okabe and Ito's
  std::size_t most = 2;
  for (const chart_line& line : lines)
    most = std::max(most, line.values.size());
  const auto x = [&](std::size_t i) {
    return left + (width - left - right) * static_cast<double>(i) / static_cast<double>(most - 1);
  };
  const auto y = [&](double v) {
    return height - bottom -
           (height - top - bottom) * (std::clamp(v, low, high) - low) / (high - low);
  };
  std::ofstream file(path);
  char text[256];
  const auto put = [&](const char* format, auto... numbers) {
    std::snprintf(text, sizeof text, format, numbers...);
    file << text;
  };
  put("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
      "font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      width, height);
  put("<text x=\"%d\" y=\"24\" font-size=\"15\">%s</text>\n", left, title.c_str());
  for (double v = low; v <= high + step / 2; v += step) {
    put("<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/>\n", left,
        width - right, y(v), y(v));
    put("<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n", left - 8, y(v) + 4, v);
  }
  const std::size_t quarter = std::max<std::size_t>(1, most / 4);
  for (const std::size_t i : std::set<std::size_t>{1, quarter, most / 2, most * 3 / 4, most})
    put("<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n", x(i - 1),
        height - bottom + 18, first + every * static_cast<int>(i - 1));
  put("<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", (left + width - right) / 2,
      height - 10, below.c_str());
  // Names stand at the ends of their lines, in the order of these, and not on each other.
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < lines.size(); ++i)
    order.push_back(i);
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return lines[a].values.back() > lines[b].values.back();
  });
  double free = top;
  for (const std::size_t i : order) {
    const char* colour = colours[i % std::size(colours)];
    file << "<polyline fill=\"none\" stroke-width=\"2\" stroke=\"" << colour << "\" points=\"";
    for (std::size_t k = 0; k < lines[i].values.size(); ++k)
      put("%.1f,%.1f ", x(k), y(lines[i].values[k]));
    const double at = std::max(free, y(lines[i].values.back()));
    put("\"/>\n<text x=\"%d\" y=\"%.1f\" fill=\"%s\">%s</text>\n", width - right + 8, at + 4,
        colour, lines[i].name.c_str());
    free = at + 16;
  }
  file << "</svg>\n";
  if (!file.flush())
    throw std::runtime_error(path + ": cannot be written");
}
