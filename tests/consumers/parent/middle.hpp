// SPDX-License-Identifier: MIT
#pragma once

#include <perdita/cross_entropy.hpp>

float middle(const perdita::cross_entropy<float>& loss);
