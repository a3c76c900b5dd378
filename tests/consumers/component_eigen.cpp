// SPDX-License-Identifier: MIT
#include <perdita/cross_entropy.hpp>

#include <Eigen/Core>

int main() { return Eigen::Vector2f(1, 2).sum() == 3 ? 0 : 1; }
