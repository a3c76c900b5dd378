// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "row_descriptor.hpp"

namespace perdita_tests {

/// What losses whose only option is a margin have in common.
template <class T, class Loss> class margin_descriptor : public row_descriptor<T> {
public:
  std::string name() const override { return Loss::name; }
  int settings() const override { return 3; }
  double margin(int setting) const {
    constexpr double margins[] = {1, 0, 2.5};
    return margins[setting];
  }
  std::string describe(int setting) const override {
    return "margin " + perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {0}; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<Loss>>(
        Loss({.margin = static_cast<T>(margin(setting)),
              .ignore_index = row_descriptor<T>::ignore_index,
              .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return Loss::traits; }
};

} // namespace perdita_tests
