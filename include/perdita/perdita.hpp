// SPDX-License-Identifier: MIT
#pragma once

/// Every loss of Perdita. Including by name what is used compiles faster.

#include "active_passive.hpp"
#include "aldr_kl.hpp"
#include "brier.hpp"
#include "comp_sum.hpp"
#include "cross_entropy.hpp"
#include "dco.hpp"
#include "distillation.hpp"
#include "ldr.hpp"
#include "ldr_k_kl.hpp"
#include "linear.hpp"
#include "orthogonal_gradient.hpp"
#include "poly.hpp"
#include "robust.hpp"
#include "robust_log_loss.hpp"
#include "smooth_adversarial.hpp"
#include "softmax.hpp"
#include "sparsemax.hpp"
#include "spherical.hpp"
#include "stablemax.hpp"
#include "top_k_hinge.hpp"
#include "version.hpp"
#include "weston_watkins.hpp"
#include "z_loss.hpp"
