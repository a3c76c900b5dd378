// SPDX-License-Identifier: MIT
#pragma once

/// Every loss of Perdita. Including by name what is used compiles faster.

#include "cross_entropy.hpp"
#include "ldr.hpp"
#include "linear.hpp"
#include "softmax.hpp"
#include "sparsemax.hpp"
#include "version.hpp"
#include "z_loss.hpp"
