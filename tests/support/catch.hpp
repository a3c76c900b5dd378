// SPDX-License-Identifier: MIT
#pragma once

// The one place that knows which Catch2 there is: 2.13 in Debian 12, 3 elsewhere. Test files
// include this and use what both have: TEST_CASE, SECTION, INFO, CAPTURE, templated tests,
// GENERATE, REQUIRE_THROWS_WITH, Catch::Matchers::WithinULP / WithinRel / WithinAbs /
// ContainsSubstring.

#if __has_include(<catch2/catch_test_macros.hpp>)

#include <catch2/catch_message.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_adapters.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#else

#include <catch2/catch.hpp>

namespace Catch::Matchers {
inline auto ContainsSubstring(const std::string& text) { return Contains(text); }
} // namespace Catch::Matchers

#endif
