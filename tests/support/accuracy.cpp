// SPDX-License-Identifier: MIT

#include "accuracy.hpp"

#include <cstdio>
#include <cstdlib>
#include <map>

namespace perdita_tests {

namespace {

/// The worst errors of each loss, as a table when the program ends.
class accuracy_table {
public:
  accuracy_table() = default;
  accuracy_table(const accuracy_table&) = delete;
  accuracy_table& operator=(const accuracy_table&) = delete;
  ~accuracy_table() {
    if (rows_.empty())
      return;
    std::printf("| | float: value | gradient | double: value | gradient | in | of the bound |\n"
                "|---|---|---|---|---|---|---|\n");
    for (const auto& [name, r] : rows_)
      std::printf("| `%s` | %s | %s | %s | %s | %s | %s |\n", name.c_str(),
                  digits(r.narrow.value).c_str(), digits(r.narrow.gradient).c_str(),
                  digits(r.full.value).c_str(), digits(r.full.gradient).c_str(), r.unit,
                  digits(std::max(r.narrow.share, r.full.share)).c_str());
  }

  void add(const std::string& loss, const std::string& detail, const char* in,
           const accuracy& found, bool in_float) {
    std::printf("%s<%s> %s: value %.2f, gradient %.2f %s; %.3f of the bound\n", loss.c_str(),
                in_float ? "float" : "double", detail.c_str(), found.value, found.gradient, in,
                found.share);
    row& r = rows_[loss];
    r.unit = in;
    accuracy& worst = in_float ? r.narrow : r.full;
    worst.value = std::max(worst.value, found.value);
    worst.gradient = std::max(worst.gradient, found.gradient);
    worst.share = std::max(worst.share, found.share);
  }

private:
  struct row {
    accuracy narrow, full;
    const char* unit = "";
  };
  static std::string digits(double x) {
    char text[32] = "";
    if (x >= 0)
      std::snprintf(text, sizeof text, "%.*f", x == 0 || x >= 9.95 ? 0 : x >= 0.95 ? 1 : 2, x);
    return text;
  }

  std::map<std::string, row> rows_;
};

} // namespace

bool reporting() {
  static const bool wanted = std::getenv("PERDITA_TEST_REPORT") != nullptr;
  return wanted;
}

void report_accuracy(const std::string& loss, const std::string& detail, const char* in,
                     const accuracy& found, bool in_float) {
  static accuracy_table table;
  if (reporting())
    table.add(loss, detail, in, found, in_float);
}

} // namespace perdita_tests
