// SPDX-License-Identifier: MIT
#pragma once

/// How far a training run is: one line redrawn in place on a terminal, a few plain lines elsewhere.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#if __has_include(<sys/ioctl.h>) && __has_include(<unistd.h>)
#include <sys/ioctl.h>
#include <unistd.h>
#endif

class progress {
public:
  explicit progress(int epochs) : epochs_(epochs) {}

  /// What an epoch came to; the next one takes its place on a terminal.
  void show(int epoch, const std::string& figures) {
    if (columns_ > 0)
      draw(epoch, 1, figures, epoch == epochs_);
    else if (epoch == epochs_ || epoch % std::max(1, epochs_ / 10) == 0)
      keep(epoch, figures); // a pipe or a file: about ten lines, readable in a log
  }
  /// How far a long epoch is, from 0 to 1: for a terminal only.
  void show_part(int epoch, double part, const std::string& figures) {
    if (columns_ > 0)
      draw(epoch, part, figures, false);
  }
  /// What an epoch came to, on a line that stays.
  void keep(int epoch, const std::string& figures) {
    std::printf("%s%s %s\n", columns_ > 0 ? "\r\033[K" : "", name(epoch).c_str(), figures.c_str());
    std::fflush(stdout);
  }

private:
  std::string name(int epoch) const {
    const int digits = static_cast<int>(std::to_string(epochs_).size());
    char text[48];
    std::snprintf(text, sizeof text, "epoch %*d/%d ", digits, epoch, epochs_);
    return text;
  }

  void draw(int epoch, double part, const std::string& figures, bool last) {
    // The eye sees no more than about twenty pictures a second; the terminal should not have to
    // draw more.
    const auto now = std::chrono::steady_clock::now();
    if (!last && now - drawn_ < std::chrono::milliseconds(50))
      return;
    drawn_ = now;

    std::string line = name(epoch);
    // A line that wraps could not be redrawn in place: the bar takes what the figures leave.
    const int used = static_cast<int>(line.size() + figures.size()) + 4;
    const int width = std::min(30, columns_ - used - 1);
    if (width >= 5) {
      const int full = static_cast<int>(width * (epoch - 1 + part) / epochs_);
      line += '[' + colour("\033[32m");
      line.append(static_cast<std::size_t>(full), '=');
      line += colour("\033[0m");
      line.append(static_cast<std::size_t>(width - full), ' ');
      line += "]  ";
      line += figures;
    } else {
      line = (line + figures).substr(0, static_cast<std::size_t>(columns_ - 1));
    }
    std::printf("\r%s\033[K%s", line.c_str(), last ? "\n" : "");
    std::fflush(stdout);
  }

  std::string colour(const char* code) const { return coloured_ ? code : ""; }

  /// The width of the terminal, or 0 where the output is none that can redraw a line.
  static int terminal_columns() {
#if defined(TIOCGWINSZ)
    const char* term = std::getenv("TERM");
    if (!isatty(STDOUT_FILENO) || !term || std::string_view(term) == "dumb")
      return 0;
    winsize size{};
    const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    return known ? size.ws_col : 80;
#else
    return 0;
#endif
  }

  int epochs_;
  int columns_ = terminal_columns();
  bool coloured_ = columns_ > 0 && std::getenv("NO_COLOR") == nullptr;
  std::chrono::steady_clock::time_point drawn_{};
};
