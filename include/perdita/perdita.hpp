// SPDX-License-Identifier: MIT
#pragma once

/// Every loss of Perdita. Including by name what is used compiles faster.

#include "active_passive.hpp"
#include "brier.hpp"
#include "comp_sum.hpp"
#include "cross_entropy.hpp"
#include "dco.hpp"
#include "ldr.hpp"
#include "linear.hpp"
#include "orthogonal_gradient.hpp"
#include "poly.hpp"
#include "robust.hpp"
#include "softmax.hpp"
#include "sparsemax.hpp"
#include "spherical.hpp"
#include "stablemax.hpp"
#include "version.hpp"
#include "z_loss.hpp"
