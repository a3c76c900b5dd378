// SPDX-License-Identifier: MIT

// The global contrastive loss: SogCLR and iSogCLR of views, and of two kinds.

#include <perdita/global_contrastive.hpp>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using state = perdita::global_contrastive_state;
using options = perdita::global_contrastive_options;
using ids = std::vector<int>;

/// A state as the formulas have it.
struct wide_state {
  std::vector<wide> u, tau, v;
  explicit wide_state(const state& s) : u(s.log_u.size(), 0) {
    for (std::size_t i = 0; i < u.size(); ++i) {
      u[i] = exp(wide(s.log_u[i]));
      tau.push_back(s.temperature[i]);
      v.push_back(s.velocity[i]);
    }
  }
};

/// One anchor: scores of its negatives and of its positive, and what the formulas make of them.
struct wide_anchor {
  std::vector<wide> s;
  wide positive, tau;

  /// Of e^{s/τ}, or of e^{(s − s⁺)/τ}.
  wide mean(bool relative) const {
    wide sum = 0;
    for (const wide& x : s)
      sum += exp(wide((relative ? wide(x - positive) : x) / tau));
    return sum / static_cast<double>(s.size());
  }
  wide gcl() const { return tau * log(mean(true)); }
  std::vector<wide> shares(const wide& u, bool relative) const {
    std::vector<wide> p;
    for (const wide& x : s)
      p.push_back(exp(wide((relative ? wide(x - positive) : x) / tau)) / u /
                  static_cast<double>(s.size()));
    return p;
  }
  wide surrogate(const std::vector<wide>& p, bool relative) const {
    wide sum = relative ? wide(0) : wide(-positive);
    for (std::size_t j = 0; j < s.size(); ++j)
      sum += p[j] * (relative ? wide(s[j] - positive) : s[j]);
    return sum;
  }
};

/// The anchors of two views (y = x) or of one direction between two kinds.
std::vector<wide_anchor> anchors_of(const wide_matrix& x, const wide_matrix& y, const ids& items,
                                    const wide_state& s, bool views) {
  const auto n = static_cast<perdita::index>(items.size());
  const wide_matrix a = unit_rows(x), b = unit_rows(y);
  std::vector<wide_anchor> result;
  for (perdita::index i = 0; i < a.rows; ++i) {
    wide_anchor anchor;
    anchor.tau = s.tau[static_cast<std::size_t>(items[static_cast<std::size_t>(i % n)])];
    for (perdita::index j = 0; j < b.rows; ++j) {
      wide dot = 0;
      for (perdita::index k = 0; k < a.cols; ++k)
        dot += a(i, k) * b(j, k);
      if (j % n != i % n)
        anchor.s.push_back(dot);
      else if (!views || j != i)
        anchor.positive = dot;
    }
    result.push_back(anchor);
  }
  return result;
}

/// What a step must come to, and what it does to the state.
struct wide_step {
  wide objective = 0;
  std::vector<std::vector<wide>> shares;

  wide_step(const std::vector<wide_anchor>& anchors, const ids& items, wide_state& s,
            const options& o, const wide& gamma, bool views) {
    const wide_state old = s;
    const std::size_t n = items.size();
    std::vector<wide> u, slope;
    for (std::size_t i = 0; i < anchors.size(); ++i) {
      const wide_anchor& a = anchors[i];
      const wide before = old.u[static_cast<std::size_t>(items[i % n])], g = a.mean(!views);
      u.push_back(before == 0 ? g : wide((1 - gamma) * before + gamma * g));
      shares.push_back(a.shares(u[i], !views));
      const wide rho = o.learn_temperature ? o.rho : 0;
      wide along = 0;
      for (std::size_t j = 0; j < a.s.size(); ++j)
        along += shares[i][j] * (views ? a.s[j] : wide(a.s[j] - a.positive));
      slope.push_back(log(u[i]) + rho - along / a.tau);
      objective += a.tau * (log(u[i]) + rho) - (views ? a.positive : wide(0));
    }
    for (std::size_t i = 0; i < n; ++i) { // in order: the last one of an item stays
      const auto item = static_cast<std::size_t>(items[i]);
      s.u[item] = views ? wide((u[i] + u[i + n]) / 2) : u[i];
      if (!o.learn_temperature)
        continue;
      wide g = views ? wide((slope[i] + slope[i + n]) / 2) : slope[i];
      g = larger(wide(-o.most_slope), smaller(g, wide(o.most_slope)));
      s.v[item] = (1 - o.beta) * old.v[item] + o.beta * g;
      s.tau[item] = larger(o.least_temperature,
                           smaller(o.most_temperature, old.tau[item] - o.rate * s.v[item]));
    }
  }
  wide surrogate(const std::vector<wide_anchor>& anchors, bool views) const {
    wide sum = 0;
    for (std::size_t i = 0; i < anchors.size(); ++i)
      sum += anchors[i].surrogate(shares[i], !views);
    return sum;
  }
};

/// Steps of batches, some of whose items are seen for the first time, and some twice.
template <class T> struct steps {
  bool views;
  options o{};
  double tau = 1;
  error_judge values{}, slopes{}, numbers{};

  double budget() const { return 8 + 4 / tau; }

  void check(const options& with, double temperature) {
    o = with, tau = temperature;
    const perdita::global_contrastive<T> loss(o);
    const std::vector<ids> batches = {{0, 3, 5, 2, 8}, {1, 3, 7, 3, 0, 3}, {5, 1, 0, 3}};
    state x(9, tau), y(9, tau);
    x.temperature[3] = y.temperature[0] = tau * 1.5;
    for (std::size_t k = 0; k < batches.size(); ++k)
      step(loss, batches[k], static_cast<int>(k), x, y);
  }
  void step(const perdita::global_contrastive<T>& loss, const ids& items, int epoch, state& x,
            state& y) {
    const auto n = static_cast<perdita::index>(items.size()), d = perdita::index(3);
    const auto seed = static_cast<std::uint64_t>(epoch + 1);
    const auto a = random_batch<T>(views ? 2 * n : n, d, seed);
    const auto b = views ? a : random_batch<T>(n, d, seed + 10);
    wide_matrix wide_a(a), wide_b(b);
    wide_state wide_x(x), wide_y(y);
    const wide_state old_x = wide_x, old_y = wide_y;
    const bool dense = o.gamma.at(epoch) == 1;

    const auto one = [&] {
      return anchors_of(wide_a, views ? wide_a : wide_b, items, old_x, views);
    };
    const auto two = [&] { return anchors_of(wide_b, wide_a, items, old_y, views); };
    const wide gamma = o.gamma.at(epoch), count = 2 * static_cast<double>(n);
    const wide_step ahead(one(), items, wide_x, o, gamma, views);
    const wide_step back(two(), items, wide_y, o, gamma, views); // not used for views
    const auto surrogate = [&]() -> wide {
      return (ahead.surrogate(one(), views) + (views ? wide(0) : back.surrogate(two(), views))) /
             count;
    };
    const auto gcl = [&]() -> wide {
      wide sum = 0;
      for (const wide_anchor& w : one())
        sum += w.gcl() + (o.learn_temperature ? wide(w.tau * o.rho) : wide(0));
      if (!views)
        for (const wide_anchor& w : two())
          sum += w.gcl() + (o.learn_temperature ? wide(w.tau * o.rho) : wide(0));
      return sum / count;
    };

    batch<T> g(a.rows, d, T(7)), h(b.rows, d, T(7));
    double objective = 0, unchanged = 0;
    T value, plain;
    const state kept_x = x, kept_y = y;
    if (views) {
      plain = loss(a.view(), items, x, {.epoch = epoch, .objective = &unchanged});
      CHECK(x == kept_x); // the value alone leaves it
      value = loss(a.view(), items, x, g.view(), {.epoch = epoch, .objective = &objective});
    } else {
      plain = loss(a.view(), b.view(), items, x, y, {.epoch = epoch, .objective = &unchanged});
      CHECK(x == kept_x);
      CHECK(y == kept_y);
      value = loss(a.view(), b.view(), items, x, y, g.view(), h.view(),
                   {.epoch = epoch, .objective = &objective});
    }
    CHECK(plain == value);
    CHECK(unchanged == objective);

    const wide expected = surrogate();
    const wide estimate = (ahead.objective + (views ? wide(0) : back.objective)) / count;
    const wide unit = std::numeric_limits<T>::epsilon();
    CHECK(values.within(size_of(wide(value - expected)), 4, unit * (1 + size_of(expected))));
    CHECK(values.within(size_of(wide(objective - estimate)), 4, unit * (1 + size_of(estimate))));
    CHECK(slopes_within(slopes, g, differences(wide_a, surrogate), budget()));
    if (!views)
      CHECK(slopes_within(slopes, h, differences(wide_b, surrogate), budget()));
    if (dense) { // the true objective and its gradients
      CHECK(values.within(size_of(wide(objective - gcl())), 4, unit));
      CHECK(slopes_within(slopes, g, differences(wide_a, gcl), budget()));
      if (!views)
        CHECK(slopes_within(slopes, h, differences(wide_b, gcl), budget()));
    }
    compare(x, wide_x);
    if (!views)
      compare(y, wide_y);
  }
  void compare(const state& got, const wide_state& expected) {
    const wide unit = std::numeric_limits<T>::epsilon();
    bool right = true;
    for (std::size_t i = 0; i < expected.u.size(); ++i) {
      const bool seen = expected.u[i] > 0;
      CHECK(seen == std::isfinite(got.log_u[i]));
      if (seen)
        right &= numbers.within(size_of(wide(got.log_u[i] - log(expected.u[i]))), budget(), unit);
      right &= numbers.within(size_of(wide(got.velocity[i] - expected.v[i])), 2 * budget(), unit);
      right &= numbers.within(size_of(wide(got.temperature[i] - expected.tau[i])), budget(), unit);
    }
    CHECK(right);
  }
};

} // namespace

TEMPLATE_TEST_CASE("Global contrastive: steps are their definitions", "", float, double) {
  for (const bool views : {true, false}) {
    const char* form = views ? "views" : "two kinds";
    steps<TestType> checked{views};
    options o{.gamma = {1}, .learn_temperature = true};
    checked.check(o, 0.5);
    o.gamma = {0.9};
    checked.check(o, 0.1);
    o.gamma = {0.3, 2}; // bounds and cuts matter, too
    o.rate = 0.1, o.most_slope = 0.5, o.rho = -2;
    checked.check(o, 0.1);
    checked.check({.gamma = {0.5}}, 0.1); // not learnt
    report_accuracy<TestType>("global_contrastive", form, in_epsilons, checked.values,
                              checked.slopes);
    report_accuracy<TestType>("global_contrastive (state)", form, in_epsilons,
                              {checked.numbers.worst(), -1, checked.numbers.share()});
  }
}

TEST_CASE("Global contrastive: golden values", "") {
  const auto x = sheet_x(), y = sheet_y();
  batch<double> both(12, 4), g(12, 4);
  std::copy(x.x.begin(), x.x.end(), both.x.begin());
  std::copy(y.x.begin(), y.x.end(), both.x.begin() + 24);
  state s(6, 0.2);
  double objective = 0;
  const ids items{0, 1, 2, 3, 4, 5};
  perdita::global_contrastive<double>()(both.seen(), items, s, g.view(),
                                        {.objective = &objective, .scale = 2});
  CHECK(near(2 * objective, 0.712563801295, 1e-11)); // there, the sum of both sides
  CHECK(near(length_of({g.x.begin(), g.x.begin() + 24}), 0.496659246, 1e-8));
  CHECK(near(length_of({g.x.begin() + 24, g.x.end()}), 0.375573, 1e-5));

  both = unit_rows(both);
  s = state(6, 0.2);
  perdita::global_contrastive<double>({.normalise = false})(both.seen(), items, s,
                                                            {.objective = &objective});
  CHECK(near(2 * objective, 0.712563801295, 1e-11));
}

TEST_CASE("Global contrastive: schedules of gamma", "") {
  const perdita::gamma_schedule constant{.last = 0.8}, cosine{.last = 0.2, .epochs = 4};
  CHECK(constant.at(0) == 0.8);
  CHECK(constant.at(9) == 0.8);
  CHECK(cosine.at(0) == 1);
  CHECK(near(cosine.at(1), 0.2 + 0.4 * (1 + std::sqrt(0.5)), 1e-15));
  CHECK(near(cosine.at(2), 0.6, 1e-15));
  CHECK(cosine.at(4) == 0.2);
  CHECK(cosine.at(100) == 0.2);
}

TEST_CASE("Global contrastive: training resumes, on any number of threads", "[threads]") {
  const perdita::global_contrastive<float> loss({.gamma = {0.5}, .learn_temperature = true});
  const perdita::index n = 70, d = 7;
  const auto items_of = [](int step) {
    ids items;
    for (int i = 0; i < 70; ++i)
      items.push_back((i * 11 + step * 29) % 90);
    return items;
  };
  const auto views = [&](int step, state& s, perdita::executor run_on) {
    const auto x = random_batch<float>(2 * n, d, static_cast<std::uint64_t>(step));
    batch<float> g(2 * n, d);
    loss(x.view(), items_of(step), s, g.view(), {.run_on = run_on});
    return g.x;
  };
  const auto kinds = [&](int step, state& s, state& t, perdita::executor run_on) {
    const auto x = random_batch<float>(n, d, static_cast<std::uint64_t>(step));
    const auto y = random_batch<float>(n, d, static_cast<std::uint64_t>(step) + 50);
    batch<float> g(2 * n, d);
    const perdita::matrix_view<float> d_y(g.x.data() + n * d, n, d);
    loss(x.view(), y.view(), items_of(step), s, t, perdita::matrix_view<float>(g.x.data(), n, d),
         d_y, {.run_on = run_on});
    return g.x;
  };
  state through(90, 0.1), first(90, 0.1), second(90, 0.2);
  std::vector<std::vector<float>> expected, expected_kinds;
  for (int step = 0; step < 4; ++step) {
    expected.push_back(views(step, through, perdita::serial));
    expected_kinds.push_back(kinds(step, first, second, perdita::serial));
  }
  for (const std::size_t threads : {2U, 5U}) {
    const threads_executor pool(threads, task_order::shuffled);
    state s(90, 0.1), a(90, 0.1), b(90, 0.2);
    for (int step = 0; step < 4; ++step) {
      if (step == 2) { // written down, and read by another program
        state read;
        read.log_u = s.log_u, read.temperature = s.temperature, read.velocity = s.velocity;
        s = state(1, 0.3);
        s = read;
      }
      CHECK(views(step, s, pool) == expected[static_cast<std::size_t>(step)]);
      CHECK(kinds(step, a, b, pool) == expected_kinds[static_cast<std::size_t>(step)]);
    }
    CHECK(s == through);
    CHECK(a == first);
    CHECK(b == second);
  }
  state forgot(90, 0.1); // what is remembered matters
  for (int step = 0; step < 2; ++step)
    views(step, forgot, perdita::serial);
  std::fill(forgot.log_u.begin(), forgot.log_u.end(), state(1, 1).log_u[0]);
  CHECK(views(2, forgot, perdita::serial) != expected[2]);

  const state before = through;
  through.resize(100, 0.4);
  CHECK(through.size() == 100);
  CHECK(through.temperature[95] == 0.4);
  CHECK(std::equal(before.log_u.begin(), before.log_u.end(), through.log_u.begin()));
}

TEST_CASE("Global contrastive: calls", "") {
  const perdita::global_contrastive<double> loss({.learn_temperature = true});
  const perdita::global_contrastive<double> sum(
      {.learn_temperature = true, .reduction = perdita::reduction::sum});
  const auto x = random_batch<double>(8, 3, 1), y = random_batch<double>(8, 3, 2);
  const ids four{0, 1, 2, 3}, eight{0, 1, 2, 3, 4, 5, 6, 7};
  batch<double> g(8, 3), h(8, 3);
  const state fresh(8, 0.1);
  state s = fresh, t = fresh;
  double objective = 0, summed = 0;
  const double value =
      loss(x.view(), y.view(), eight, s, t, g.view(), h.view(), {.objective = &objective});
  { // reduction, scale, accumulation
    batch<double> again(8, 3, 1.0), other(8, 3, 1.0);
    state a = fresh, b = fresh;
    CHECK(near(sum(x.view(), y.view(), eight, a, b, again.view(), other.view(),
                   {.objective = &summed, .scale = 0.125, .accumulate = true}),
               16 * value, 1e-14));
    CHECK(near(summed, 16 * objective, 1e-14));
    CHECK(a == s);
    CHECK(b == t);
    bool same = true;
    for (std::size_t i = 0; i < g.x.size(); ++i)
      same &= near(again.x[i], 1 + 2 * g.x[i], 1e-13) && near(other.x[i], 1 + 2 * h.x[i], 1e-13);
    CHECK(same);
  }
  { // What is no number stays out of the state.
    auto spoilt = x;
    spoilt(1, 0) = std::numeric_limits<double>::quiet_NaN();
    state a = fresh;
    CHECK(std::isnan(loss(spoilt.view(), four, a, g.view())));
    CHECK(a == fresh);
  }
  { // One temperature far below the other's, and a u of e^500 that is forgotten at once or not.
    state a = fresh;
    a.temperature[0] = 1e-4;
    a.log_u[1] = 5000;
    CHECK(std::isfinite(loss(x.view(), four, a, g.view())));
    for (const double slope : g.x)
      CHECK(std::isfinite(slope));
    CHECK(near(a.log_u[1], 5000 + std::log(0.1), 1e-12)); // γ = 0.9 is of what is new
    a.log_u[1] = 5000;
    CHECK(std::isfinite(
        perdita::global_contrastive<double>({.gamma = {1.0}})(x.view(), four, a, g.view())));
    CHECK(a.log_u[1] < 100);
  }
  const ids none;
  CHECK(loss(perdita::matrix_view<const double>(nullptr, 0, 3), none, fresh,
             {.objective = &objective}) == 0);
  CHECK(objective == 0);
}

TEST_CASE("Global contrastive: refusals", "") {
  using Catch::Matchers::ContainsSubstring;
  using loss_of = perdita::global_contrastive<double>;
  const loss_of loss;
  const auto x = random_batch<double>(8, 3, 1);
  const batch<double> pair(2, 3, 1.0), one(1, 3, 1.0);
  batch<double> g(8, 3, 7.0), h(8, 3, 7.0);
  const state fresh(8, 0.1);
  state s = fresh, t = fresh;
  const auto refused = [&](const ids& items, state& with, const char* why) {
    const state kept = with;
    CHECK_THROWS_WITH(loss(x.view(), items, with, g.view()), ContainsSubstring(why));
    CHECK(with.velocity.size() == kept.velocity.size());
    CHECK(g.x == std::vector<double>(24, 7.0));
  };
  refused({0, 1, 2}, s, "size of items is 3, expected 4");
  refused({0, 1, 2, 8}, s, "items[3] is 8, expected 0 or more and less than 8");
  refused({0, -1, 2, 3}, s, "items[1] is -1");
  state bad = fresh;
  bad.temperature[2] = 0;
  refused({0, 1, 2, 3}, bad, "temperature[2] is 0");
  bad = fresh;
  bad.log_u[2] = std::numeric_limits<double>::quiet_NaN();
  refused({0, 1, 2, 3}, bad, "log_u[2] is");
  bad = fresh;
  bad.velocity[3] = std::numeric_limits<double>::infinity();
  refused({0, 1, 2, 3}, bad, "velocity[3] is inf");
  bad.velocity.pop_back();
  refused({0, 1, 2, 3}, bad, "velocity is 7, expected 8");
  CHECK_THROWS_WITH(loss(pair.view(), ids{0}, s), ContainsSubstring("items of the batch is 1"));
  CHECK_THROWS_WITH(loss(one.view(), one.view(), ids{0}, s, t),
                    ContainsSubstring("items of the batch is 1"));
  CHECK_THROWS_WITH(loss(one.view(), ids{0}, s), ContainsSubstring("rows of x is 1"));
  const ids eight{0, 1, 2, 3, 4, 5, 6, 7};
  CHECK_THROWS_WITH(loss(x.view(), pair.view(), eight, s, t), ContainsSubstring("rows of y is 2"));
  CHECK_THROWS_WITH(loss(x.view(), x.view(), eight, s, s, g.view(), h.view()),
                    ContainsSubstring("state_y is state_x itself"));
  CHECK_THROWS_WITH(loss(x.view(), x.view(), eight, s, t, g.view(), g.view()),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(x.view(), ids{0, 1, 2, 3}, s, {.epoch = -1}),
                    ContainsSubstring("epoch is -1"));
  CHECK(s == fresh);
  CHECK(t == fresh);
  const auto options_refused = [](const options& o, const char* why) {
    CHECK_THROWS_WITH(loss_of(o), ContainsSubstring(why));
  };
  options_refused({.gamma = {0}}, "gamma is 0");
  options_refused({.gamma = {0.5, -1}}, "epochs of gamma is -1");
  options_refused({.rho = std::nan("")}, "rho is");
  options_refused({.rate = -1}, "rate is -1");
  options_refused({.beta = 1.5}, "beta is 1.5");
  options_refused({.most_slope = 0}, "most_slope is 0");
  options_refused({.least_temperature = 0}, "least_temperature is 0");
  options_refused({.most_temperature = 0.01}, "most_temperature is 0.01");
}

TEST_CASE("Global contrastive: other bounds and averages of slopes", "") {
  for (const bool views : {true, false}) {
    steps<double> checked{views};
    checked.check({.gamma = {0.5},
                   .learn_temperature = true,
                   .rho = -2,
                   .rate = 0.2,
                   .beta = 0.4,
                   .least_temperature = 0.12,
                   .most_temperature = 0.16},
                  0.14);
  }
}

} // namespace perdita_tests
