// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/linear_divergence.hpp"
#include "core/sequences.hpp"
#include "cross_entropy.hpp"
#include "distillation.hpp"
#include "linear.hpp"

namespace perdita::inline PERDITA_ABI {

/// Where sequences lie among rows, one row a token. Refers to the caller's memory.
class sequence_layout {
public:
  /// Sequence i has the rows i · steps to (i + 1) · steps − 1, all of them.
  static sequence_layout padded(index batch, index steps) {
    check_shape(batch, steps);
    return {batch, steps, {}, batch * steps};
  }
  /// The same, of which the first lengths[i] are its tokens, and the rest is padding.
  template <core::labels_like L>
  static sequence_layout padded(index batch, index steps, L&& lengths) {
    check_lasting<L>();
    check_shape(batch, steps);
    sequence_layout result{batch, steps, {}, batch * steps};
    core::sequence_checks<double>{name}.lengths("lengths", result.numbers_,
                                                core::as_vector(lengths), batch, steps);
    return result;
  }
  /// Sequence i has the rows offsets[i] to offsets[i + 1] − 1: one more offset than sequences.
  template <core::labels_like O> static sequence_layout ragged(O&& offsets) {
    check_lasting<O>();
    const auto view = core::as_vector(offsets);
    core::require(view.size > 0, name, "size of offsets", view.size, "at least 1");
    core::require(view.data != nullptr, name, "offsets", 0, "a pointer to memory");
    const core::integer_rows numbers(view);
    for (index i = 0; i < view.size; ++i)
      if (const std::int64_t at = numbers.at(0, i); i == 0 ? at != 0 : at < numbers.at(0, i - 1))
        core::fail_at(name, "offsets", i, core::to_text(at), "numbers that rise from 0");
    return {view.size - 1, -1, numbers, static_cast<index>(numbers.at(0, view.size - 1))};
  }

  index sequences() const { return sequences_; }
  index rows() const { return rows_; }
  index first(index sequence) const {
    return steps_ < 0 ? static_cast<index>(numbers_.at(0, sequence)) : sequence * steps_;
  }
  index length(index sequence) const {
    if (steps_ < 0)
      return first(sequence + 1) - first(sequence);
    return numbers_.data ? static_cast<index>(numbers_.at(0, sequence)) : steps_;
  }

private:
  static constexpr const char* name = "sequence_layout";
  sequence_layout(index sequences, index steps, const core::integer_rows& numbers, index rows)
      : sequences_(sequences), steps_(steps), numbers_(numbers), rows_(rows) {}
  template <class V> static void check_lasting() {
    static_assert(std::is_lvalue_reference_v<V> || std::is_trivially_copyable_v<V>,
                  "perdita::sequence_layout: refers to lengths or offsets, which must outlive it");
  }
  static void check_shape(index batch, index steps) {
    core::require(batch >= 0, name, "batch", batch, "0 or more");
    core::require(steps >= 0, name, "steps", steps, "0 or more");
  }

  index sequences_, steps_; // -1 steps: ragged
  core::integer_rows numbers_;
  index rows_;
};

/// The model that a policy is compared with: its scores where the policy's are given, its hidden
/// states and class weights where the policy's are. It is frozen: it has no gradient. Refers to the
/// caller's memory, which must last until the last way back.
template <class T> struct reference_model {
  reference_model() = default;
  template <core::matrix_like X>
  requires std::same_as<std::remove_const_t<typename core::element_of<X>::type>, T>
  explicit reference_model(X&& logits) : scores(core::as_matrix(logits)) {}
  template <class X, class M>
  requires core::scores_like<X, T> && core::scores_like<M, T> reference_model(X&& h, M&& w)
      : hidden(core::as_matrix(h)), weights(core::as_matrix(w)) {}
  template <class X, class M, class B>
  requires core::scores_like<X, T> && core::scores_like<M, T> reference_model(X&& h,
                                                                              const affine<M, B>& w)
      : hidden(core::as_matrix(h)), weights(core::as_matrix(w.matrix)),
        bias(core::as_vector(w.bias)) {}

  matrix_view<const T> scores;
  core::matrix_data<T> hidden, weights;
  vector_view<const T> bias;
};

/// What a call of the sequence head may be given and asked for. Weights lie by token, as labels do;
/// by-products by row, as scores and hidden states do: with a shift, row t has those of its
/// prediction of token t + 1. They are 0 in rows that predict nothing that counts.
template <class T> struct sequence_call {
  /// w_t, any finite numbers; a mask is one of 0 and 1. 0 removes a token; all 1 if not given.
  vector_view<const T> token_weights{};
  reference_model<T> reference{}; ///< for the divergences and their gradients

  vector_view<T> target_log_probability{}; ///< log p of the row's token
  vector_view<T> log_sum_exp{};
  vector_view<T> entropy{};                   ///< −Σ p log p
  vector_view<T> reverse_kl{};                ///< KL(p ‖ q), q being the reference's
  vector_view<T> forward_kl{};                ///< KL(q ‖ p)
  vector_view<T> reference_log_probability{}; ///< log q of the row's token
  vector_view<std::int64_t> counts{};         ///< n of each sequence

  executor run_on{};
  workspace* memory = nullptr;
};

/// What a gradient of the sequence head may be asked for.
template <class T> struct sequence_gradient {
  bool accumulate = false; ///< adds to every gradient instead of overwriting
  T scale = 1;             ///< multiplies every gradient
  /// ∂L/∂ of what else L is made of, one number a row, as the by-products are: each by itself, so
  /// that log p of a row has W_t c_i of its score and this. Rows that predict nothing that counts
  /// have none, whatever is said here. No view: 0.
  vector_view<const T> d_log_probability{}, d_forward_kl{}, d_reverse_kl{}, d_entropy{};
};

namespace core {

inline constexpr const char* sequence_head_name = "sequence_head";
/// Whatever the caller's ignore_index is: the label of rows that predict nothing that counts.
inline constexpr std::int64_t no_target = -1;

template <class V>
void require_size(const char* what, const V& view, index expected, const char* of) {
  sequence_checks<double> check{sequence_head_name};
  check.size(what, view.size, expected, of);
  check.memory(what, view.data, view.size);
}

/// What every row predicts, and what that counts for.
struct sequence_tokens {
  sequence_layout layout;
  bool average;
  std::vector<std::int64_t> labels{};
  std::vector<double> weights{}; ///< without the average's 1/n
  std::vector<index> counts{};   ///< of each sequence: tokens that count

  index rows() const { return layout.rows(); }
  template <class T, class L>
  void read(const vector_view<L>& from, const vector_view<const T>& token_weights, bool shift,
            std::int64_t ignore_index, index classes) {
    labels.assign(static_cast<std::size_t>(rows()), no_target);
    weights.assign(labels.size(), 0.0);
    for (index i = 0; i < layout.sequences(); ++i) {
      const index first = layout.first(i), end = first + layout.length(i);
      index n = 0;
      for (index token = first + shift; token < end; ++token) {
        std::int64_t label;
        read_labels<std::remove_const_t<L>>(from.data, from.stride, token, 1, &label);
        const double w = token_weights.data ? static_cast<double>(token_weights[token]) : 1.0;
        if (label == ignore_index || w == 0)
          continue;
        if (label < 0 || label >= classes)
          fail_at(sequence_head_name, "labels", token, to_text(label),
                  "0 to the number of classes less 1, or ignore_index " + to_text(ignore_index));
        if (!std::isfinite(w))
          fail_at(sequence_head_name, "token_weights", token, to_text(w), "a finite number");
        const auto row = static_cast<std::size_t>(token - shift);
        labels[row] = label;
        weights[row] = w;
        ++n;
      }
      counts.push_back(n);
    }
  }
  /// What Σ_t w_t log p is divided by.
  double divisor(index sequence) const {
    const index n = counts[static_cast<std::size_t>(sequence)];
    return average && n > 0 ? static_cast<double>(n) : 1;
  }
  template <class T> double score(index sequence, const vector_view<const T>& log_p) const {
    exact_sum sum;
    for_rows(sequence, [&](index r, double w) { sum.add(w * static_cast<double>(log_p[r])); });
    return sum.value() / divisor(sequence);
  }
  /// factor · ∂L/∂log p of every row: W_t ∂L/∂s, and what there is besides.
  template <class C, class T, class D>
  std::vector<C> coefficients(const vector_view<D>& d_scores, const vector_view<const T>& besides,
                              double factor) const {
    std::vector<C> c(labels.size(), C(0));
    for (index i = 0; i < layout.sequences(); ++i) {
      const double d = factor * static_cast<double>(d_scores[i]) / divisor(i);
      for_rows(i, [&](index r, double w) {
        const double all = besides.data ? w * d + factor * static_cast<double>(besides[r]) : w * d;
        c[static_cast<std::size_t>(r)] = static_cast<C>(all);
      });
    }
    return c;
  }
  /// factor · d where a row counts, and 0 elsewhere.
  template <class T>
  std::vector<T> where_counted(const vector_view<const T>& d, double factor) const {
    std::vector<T> result(labels.size(), T(0));
    for (std::size_t r = 0; r < labels.size(); ++r)
      if (labels[r] != no_target)
        result[r] = static_cast<T>(factor * static_cast<double>(d[static_cast<index>(r)]));
    return result;
  }

private:
  template <class F> void for_rows(index sequence, F f) const {
    const index first = layout.first(sequence), end = first + layout.length(sequence);
    for (index r = first; r < end; ++r)
      if (labels[static_cast<std::size_t>(r)] != no_target)
        f(r, weights[static_cast<std::size_t>(r)]);
  }
};

template <class T> struct sequence_settings {
  T temperature, softcap;
  linear_options head;

  cross_entropy<T> loss() const {
    return {{.ignore_index = no_target,
             .reduction = reduction::sum,
             .temperature = temperature,
             .softcap = softcap}};
  }
};

template <class T> bool wants_reference(const sequence_call<T>& call) {
  return call.reverse_kl.data || call.forward_kl.data || call.reference_log_probability.data;
}
template <class T>
void require_reference(const sequence_settings<T>& settings, bool there, const char* expected) {
  if (!there)
    fail(sequence_head_name, "reference", "missing", expected);
  require(settings.softcap == 0, sequence_head_name, "softcap", settings.softcap,
          "0 where there is a reference");
}

template <class T>
call_options<T> forward_options(const sequence_call<T>& call, const vector_view<T>& log_p) {
  call_options<T> c;
  c.run_on = call.run_on;
  c.memory = call.memory;
  c.target_log_probability = log_p;
  c.log_sum_exp = call.log_sum_exp;
  c.entropy = call.entropy;
  return c;
}
/// The gradient of Σ c_r log p_r, from weights of −log p: `minus_c`.
template <class T>
call_options<T> backward_options(const sequence_call<T>& call, const std::vector<T>& minus_c,
                                 bool accumulate) {
  call_options<T> c;
  c.run_on = call.run_on;
  c.memory = call.memory;
  c.row_weights = minus_c;
  c.accumulate = accumulate;
  return c;
}

template <class T> bool moves_divergences(const sequence_gradient<T>& how) {
  return how.d_forward_kl.data || how.d_reverse_kl.data;
}
/// The slopes that have the size of the rows, and softcap where they cannot have it.
template <class T>
void check_slopes(const sequence_settings<T>& settings, const sequence_gradient<T>& how,
                  index rows) {
  const std::pair<const char*, vector_view<const T>> all[] = {
      {"size of d_log_probability", how.d_log_probability},
      {"size of d_forward_kl", how.d_forward_kl},
      {"size of d_reverse_kl", how.d_reverse_kl},
      {"size of d_entropy", how.d_entropy}};
  for (const auto& [what, d] : all)
    if (d.data || d.size > 0) {
      require_size(what, d, rows, "as many as there are rows");
      require_memory(sequence_head_name, what, d.data, d.size);
    }
  require(settings.softcap == 0 || !how.d_entropy.data, sequence_head_name, "softcap",
          settings.softcap, "0 where there is the gradient of an entropy");
}

// ---- where log-probabilities come from: each says of how many classes, makes log p of every row,
// and takes c_r = ∂L/∂log p_r to gradients.

template <class T> struct given_log_probabilities {
  vector_view<const T> given;

  index rows() const { return given.size; }
  index classes() const { return std::numeric_limits<index>::max(); }
  void check(const sequence_settings<T>&, const sequence_call<T>& call) const {
    sequence_checks<T>{sequence_head_name}.memory("log-probabilities", given.data, given.size);
    if (call.log_sum_exp.data || call.entropy.data || wants_reference(call))
      fail("perdita::sequence_head: a by-product of the scores is asked for, expected none but "
           "target_log_probability and counts where log-probabilities are given");
  }
  vector_view<const T> forward(const sequence_settings<T>&, const sequence_tokens& tokens,
                               const sequence_call<T>& call, std::vector<T>&) {
    if (const auto& to = call.target_log_probability; to.data)
      for (index r = 0; r < rows(); ++r)
        to[r] = tokens.labels[static_cast<std::size_t>(r)] != no_target ? given[r] : T(0);
    return given;
  }
  template <class D, class G>
  void backward(const sequence_settings<T>& settings, const sequence_tokens& tokens,
                const sequence_call<T>&, const vector_view<D>& d_scores,
                const sequence_gradient<T>& how, G& gradient) const {
    const vector_view<T> to(as_vector(gradient));
    require_size("size of the gradient", to, rows(), "the log-probabilities");
    check_slopes(settings, how, rows());
    if (moves_divergences(how) || how.d_entropy.data)
      fail("perdita::sequence_head: the gradient of a divergence or an entropy is given, expected "
           "none where log-probabilities are given");
    const auto c =
        tokens.coefficients<T>(d_scores, how.d_log_probability, static_cast<double>(how.scale));
    for (index r = 0; r < rows(); ++r)
      to[r] = c[static_cast<std::size_t>(r)] + (how.accumulate ? to[r] : T(0));
  }
};

template <class T, class S> struct given_scores {
  matrix_view<S> scores;

  index rows() const { return scores.rows; }
  index classes() const { return scores.cols; }
  void check(const sequence_settings<T>& settings, const sequence_call<T>& call) const {
    if (wants_reference(call))
      check_reference(settings, call);
  }
  vector_view<const T> forward(const sequence_settings<T>& settings, const sequence_tokens& tokens,
                               const sequence_call<T>& call, std::vector<T>& log_p) {
    vector_view<T> to = call.target_log_probability;
    if (!to.data) {
      log_p.resize(tokens.labels.size());
      to = log_p;
    }
    settings.loss()(scores, tokens.labels, forward_options(call, to));
    for (const bool forward : {false, true})
      if (const auto& kl = forward ? call.forward_kl : call.reverse_kl; kl.data) {
        const std::vector<T> counted = counted_rows(tokens);
        call_options<T> c = backward_options(call, counted, false);
        c.values = kl;
        far(settings, forward)(scores, call.reference.scores, c);
      }
    if (call.reference_log_probability.data) {
      sequence_call<T> plain;
      plain.run_on = call.run_on;
      plain.memory = call.memory;
      settings.loss()(call.reference.scores, tokens.labels,
                      forward_options(plain, call.reference_log_probability));
    }
    return to;
  }
  template <class D, class G>
  void backward(const sequence_settings<T>& settings, const sequence_tokens& tokens,
                const sequence_call<T>& call, const vector_view<D>& d_scores,
                const sequence_gradient<T>& how, G& gradient) const {
    check_divergences(settings, call, how, gradient);
    const auto scale = static_cast<double>(how.scale);
    const auto c = tokens.coefficients<T>(d_scores, how.d_log_probability, -scale);
    settings.loss()(scores, tokens.labels, gradient, backward_options(call, c, how.accumulate));
    const auto add = [&](const vector_view<const T>& d, double factor, bool forward,
                         const matrix_view<const T>& from) {
      if (!d.data)
        return;
      const auto k = tokens.where_counted(d, factor);
      far(settings, forward)(scores, from, gradient, backward_options(call, k, true));
    };
    add(how.d_reverse_kl, scale, false, call.reference.scores);
    add(how.d_forward_kl, scale, true, call.reference.scores);
    static constexpr T same = 0; // H(p) = log K − KL(p ‖ uniform)
    add(how.d_entropy, -scale, false, {&same, rows(), classes(), 0, 0});
  }

private:
  void check_reference(const sequence_settings<T>& settings, const sequence_call<T>& call) const {
    const auto& reference = call.reference.scores;
    require_reference(settings, reference.data || rows() * classes() == 0,
                      "a reference_model of scores, where something of it is asked for");
    const sequence_checks<T> check{sequence_head_name};
    check.size("rows of the reference", reference.rows, rows(), "the rows that the scores have");
    check.size("columns of the reference", reference.cols, classes(),
               "the columns that the scores have");
  }
  static std::vector<T> counted_rows(const sequence_tokens& tokens) {
    std::vector<T> result;
    for (const std::int64_t label : tokens.labels)
      result.push_back(label != no_target ? T(1) : T(0));
    return result;
  }
  static distillation<T> far(const sequence_settings<T>& settings, bool forward) {
    return {{.divergence = forward ? divergence::forward_kl : divergence::reverse_kl,
             .temperature = settings.temperature,
             .keep_size = false,
             .reduction = reduction::sum}};
  }
  template <class G>
  void check_divergences(const sequence_settings<T>& settings, const sequence_call<T>& call,
                         const sequence_gradient<T>& how, G& gradient) const {
    check_slopes(settings, how, rows());
    if (moves_divergences(how))
      check_reference(settings, call);
    else if (!how.d_entropy.data)
      return;
    row_job<T> job;
    job.scores = matrix_data<T>(scores);
    job.gradient = matrix_data<T, true>(as_matrix(gradient));
    if (moves_divergences(how))
      job.soft = matrix_data<T>(call.reference.scores);
    if (check_overlap(sequence_head_name, job))
      fail(
          "perdita::sequence_head: the gradient overwrites the scores or the reference's, expected "
          "memory apart where there is the gradient of a divergence or an entropy");
  }
};

/// Class weights, with a bias, as views that can be kept.
template <class M, class B> struct affine_views {
  matrix_view<M> matrix;
  vector_view<B> bias;
};
template <class M> auto weights_to_keep(M& m) {
  if constexpr (requires { m.bias; })
    return affine_views<typename element_of<decltype(m.matrix)>::type,
                        typename element_of<decltype(m.bias)>::type>{as_matrix(m.matrix),
                                                                     as_vector(m.bias)};
  else
    return as_matrix(m);
}

template <class T, class X, class M> struct hidden_states {
  matrix_view<X> hidden;
  M weights;
  std::vector<linear_record> records{};      // what the first pass knows of every row
  std::vector<divergence_record> compared{}; // and of the reference's, where there is one

  static constexpr bool has_bias = requires(M m) { m.bias; };
  const auto& matrix() const {
    if constexpr (has_bias)
      return weights.matrix;
    else
      return weights;
  }
  index rows() const { return hidden.rows; }
  index classes() const { return matrix().rows; }
  void check(const sequence_settings<T>& settings, const sequence_call<T>& call) const {
    if (!wants_reference(call) && !compares(call))
      return;
    const reference_model<T>& q = call.reference;
    require_reference(
        settings, q.weights.data || classes() == 0,
        "a reference_model of hidden states and weights, where something of it is asked for");
    const sequence_checks<T> check{sequence_head_name};
    check.size("rows of the reference's hidden states", q.hidden.rows, rows(),
               "the rows that the hidden states have");
    check.size("rows of the reference's weights", q.weights.rows, classes(),
               "the classes that the weights have");
    check.size("columns of the reference's weights", q.weights.cols, q.hidden.cols,
               "the columns that its hidden states have");
    check.memory("reference's hidden states", q.hidden.data, q.hidden.rows * q.hidden.cols);
    if (!q.bias.data && q.bias.size == 0)
      return;
    require_size("size of the reference's bias", q.bias, classes(),
                 "the classes that the weights have");
    require(q.bias.stride == 1, sequence_head_name, "stride of the reference's bias", q.bias.stride,
            "1");
  }
  vector_view<const T> forward(const sequence_settings<T>& settings, const sequence_tokens& tokens,
                               const sequence_call<T>& call, std::vector<T>& log_p) {
    vector_view<T> to = call.target_log_probability;
    if (!to.data) {
      log_p.resize(tokens.labels.size());
      to = log_p;
    }
    records.resize(tokens.labels.size());
    with_slice(settings, settings.loss(), tokens.labels, forward_options(call, to), false,
               [&](const auto& slice) {
                 if (compares(call))
                   compare(settings, tokens, call);
                 else
                   slice.summarise(records);
                 slice.finish(records);
               });
    return to;
  }
  template <class D, class DX, class DM>
  void backward(const sequence_settings<T>& settings, const sequence_tokens& tokens,
                const sequence_call<T>& call, const vector_view<D>& d_scores,
                const sequence_gradient<T>& how, DX& d_hidden, DM& d_weights) const {
    check_slopes(settings, how, rows());
    const auto scale = static_cast<double>(how.scale);
    const auto run = [&](const auto& loss, const auto& labels, const call_options<T>& options) {
      with_slice(settings, loss, labels, options, how.accumulate,
                 [&](const auto& slice) { slice.backward(records, d_hidden, d_weights); });
    };
    if (!moves_divergences(how) && !how.d_entropy.data) {
      const auto c = tokens.coefficients<T>(d_scores, how.d_log_probability, -scale);
      return run(settings.loss(), tokens.labels, backward_options(call, c, how.accumulate));
    }
    check_terms(settings, call, how);
    std::vector<token_slopes> slopes(records.size());
    std::vector<std::int64_t> labels = tokens.labels;
    const auto c = tokens.coefficients<double>(d_scores, how.d_log_probability, scale);
    for (std::size_t r = 0; r < slopes.size(); ++r) {
      if (labels[r] == no_target)
        continue;
      const auto of = [&](const vector_view<const T>& d) {
        return d.data ? scale * static_cast<double>(d[static_cast<index>(r)]) : 0;
      };
      slopes[r] = {c[r], of(how.d_reverse_kl), of(how.d_forward_kl), of(how.d_entropy)};
      if (!slopes[r].any())
        labels[r] = no_target;
    }
    token_gradient_formula<T> formula;
    formula.slopes = slopes;
    formula.compared = compared;
    formula.inverse_temperature = 1 / static_cast<double>(settings.temperature);
    if (moves_divergences(how)) {
      formula.other = reference(call);
      check_apart(formula.other, d_hidden, d_weights);
    }
    call_options<T> options;
    options.run_on = call.run_on;
    options.memory = call.memory;
    options.accumulate = how.accumulate;
    run(token_gradient<T>(formula, no_target), labels, options);
  }

private:
  static bool compares(const sequence_call<T>& call) { return call.reference.weights.data; }
  static linear_operands<T> reference(const sequence_call<T>& call) {
    const auto& q = call.reference;
    return {q.hidden, q.weights, q.bias.data};
  }
  /// What the first pass must have been asked for.
  void check_terms(const sequence_settings<T>& settings, const sequence_call<T>& call,
                   const sequence_gradient<T>& how) const {
    if (moves_divergences(how))
      require_reference(settings, compares(call) || classes() == 0,
                        "a reference_model of hidden states and weights with the scores, where "
                        "there is the gradient of a divergence");
    if (how.d_entropy.data && !call.entropy.data && !compares(call) && rows() > 0)
      fail(sequence_head_name, "entropy", "missing",
           "a by-product of the scores, where there is its gradient");
    const auto& o = settings.head;
    require(o.drop_mass == 0 && o.drop_below == 0, sequence_head_name, "drop_mass or drop_below",
            o.drop_mass + o.drop_below,
            "0 where there is the gradient of a divergence or an entropy");
  }
  /// The linear head knows nothing of the reference.
  template <class DX, class DM>
  static void check_apart(const linear_operands<T>& other, DX& d_hidden, DM& d_weights) {
    std::vector<extent> memory;
    const auto add = [&](const auto& m) { memory.push_back(bytes_of(m)); };
    const auto column = [](auto v) { return matrix_view(v.data, v.size, 1, v.stride, 1); };
    add(matrix_data<T, true>(as_matrix(d_hidden)));
    if constexpr (requires { d_weights.bias; }) {
      add(matrix_data<T, true>(as_matrix(d_weights.matrix)));
      add(matrix_data<T, true>(column(as_vector(d_weights.bias))));
    } else {
      add(matrix_data<T, true>(as_matrix(d_weights)));
    }
    const std::size_t written = memory.size();
    add(other.hidden);
    add(other.weights);
    if (other.bias)
      add(matrix_data<T>(column(vector_view(other.bias, other.weights.rows))));
    require_apart(sequence_head_name, memory, written);
  }
  /// The records, and what there is to say of the reference.
  void compare(const sequence_settings<T>& settings, const sequence_tokens& tokens,
               const sequence_call<T>& call) {
    linear_operands<T> policy{matrix_data<T>(hidden), matrix_data<T>(matrix())};
    if constexpr (has_bias)
      policy.bias = weights.bias.data;
    compared.resize(records.size());
    const divergence_results<T> to{call.reverse_kl, call.forward_kl, call.reference_log_probability,
                                   records.data(), compared.data()};
    for (const auto& v : {to.reverse_kl, to.forward_kl, to.reference_log_probability})
      for (index r = 0; r < v.size; ++r)
        v[r] = T(0);
    find_divergences(policy, reference(call),
                     static_cast<T>(1 / static_cast<double>(settings.temperature)), tokens.labels,
                     to, call.run_on, call.memory);
  }
  /// Scores that are held for no more than a piece per thread: a function of the shape alone, as
  /// the order of sums is. Small vocabularies would then have pieces for few threads, and get a
  /// block's.
  std::size_t least_budget() const {
    using shape = linear_shape<T>;
    const shape s{classes()};
    const index packs = (std::max<index>(rows(), 1) + shape::width - 1) / shape::width;
    const index most = std::min(shape::columns, packs * shape::width);
    const index tight = (s.pieces() * std::min<index>(most, 64) - 1) / most; // see linear::plan()
    const index slots = tight >= 8 ? tight : s.pieces();
    return static_cast<std::size_t>(std::max<index>(slots, 1) * s.slot(most)) * sizeof(T);
  }
  template <class Loss, class F>
  void with_slice(const sequence_settings<T>& settings, const Loss& loss,
                  const std::vector<std::int64_t>& labels, const call_options<T>& call,
                  bool accumulate, F f) const {
    linear_options o = settings.head;
    o.accumulate_weights = o.accumulate_weights || accumulate;
    if (o.budget == 0)
      o.budget = least_budget();
    const linear<Loss> head(loss, o);
    auto x = hidden;
    if constexpr (has_bias) {
      auto m = weights.matrix;
      auto b = weights.bias;
      f(head.slice(x, affine(m, b), labels, 0, classes(), call));
    } else {
      auto m = weights;
      f(head.slice(x, m, labels, 0, classes(), call));
    }
  }
};

} // namespace core

/// The scores of a call of the sequence head: what is needed to go back. Refers to the memory of
/// the arguments that they were made from.
template <class T, class Source> class sequence_pass {
public:
  /// From d_scores, c_i = ∂L/∂s_i, what the source is made of: the gradients of given
  /// log-probabilities, of scores, or of hidden states and weights (or both of affine(weights,
  /// bias)), written or added. May be called any number of times.
  template <core::vector_like D, class G>
  void backward(D&& d_scores, G&& gradient, const sequence_gradient<T>& how = {}) const {
    run(d_scores, how, gradient);
  }
  template <core::vector_like D, class DX, class DM>
  requires(!std::same_as<std::remove_cvref_t<DM>, sequence_gradient<T>>) void backward(
      D&& d_scores, DX&& d_hidden, DM&& d_weights, const sequence_gradient<T>& how = {}) const {
    run(d_scores, how, d_hidden, d_weights);
  }
  /// Tokens of a sequence that count: n.
  index count(index sequence) const { return tokens_.counts[static_cast<std::size_t>(sequence)]; }

private:
  template <class> friend class sequence_head;
  sequence_pass(const core::sequence_settings<T>& settings, core::sequence_tokens tokens,
                Source source, const sequence_call<T>& call)
      : settings_(settings), tokens_(std::move(tokens)), source_(std::move(source)), call_(call) {}

  template <class D, class... G>
  void run(D& d_scores, const sequence_gradient<T>& how, G&... gradients) const {
    const auto d = core::as_vector(d_scores);
    using E = std::remove_const_t<typename core::element_of<D>::type>;
    static_assert(std::same_as<E, T> || std::same_as<E, double>,
                  "perdita::sequence_head: d_scores are of the head's type or double");
    core::require_size("size of d_scores", d, tokens_.layout.sequences(),
                       "as many as there are sequences");
    source_.backward(settings_, tokens_, call_, d, how, gradients...);
  }

  core::sequence_settings<T> settings_;
  core::sequence_tokens tokens_;
  Source source_;
  sequence_call<T> call_;
};

struct sequence_options {
  bool average = false;             ///< divides a score by n, its number of tokens that count
  bool shift = true;                ///< row t predicts token t + 1 of its sequence; else token t
  std::int64_t ignore_index = -100; ///< tokens with this label do not count: prompts, padding
  double temperature = 1;           ///< > 0
  double softcap = 0;               ///< > 0, or 0 for none: as in cross_entropy
  linear_options head{};            ///< from hidden states; budget 0: one piece per thread
};

/// The sequence head: one score for every sequence of tokens,
///
///   s_i = Σ_t w_t log p(y_t)    or, with average, 1/n_i of that;   ∂L/∂log p(y_t) = W_t ∂L/∂s_i
///
/// with W_t = w_t, or w_t / n_i. Losses of preferences are functions of such scores. n_i counts the
/// tokens whose label is not ignore_index and whose weight is not 0; it is no sum of weights.
///
/// log p comes from one of three sources:
///
///   log-probabilities    a vector, one number a row;     ∂/∂log p = W c,  c_i = ∂L/∂s_i
///   scores z             rows × classes, p = softmax;    ∂/∂z = G = W c (onehot − p)
///   hidden states X and class weights A (and a bias b), z = X Aᵀ + b, by the linear head, which
///                        never holds z;                  ∂/∂X = G A, ∂/∂A = Gᵀ X, ∂/∂b = Gᵀ 1
///
/// in two passes: scores() makes s and by-products, and what it returns goes backward() from c,
/// which may depend on all scores of the batch. Or both in one call, with a loss in between.
///
/// A loss may also be made of each row's log p, entropy H(p), and divergences from a frozen
/// reference's q. With c, e, a, b = ∂L/∂ of log p (W_t c_i and what else there is), H(p), KL(p ‖ q)
/// and KL(q ‖ p) of a row (see sequence_gradient), in one pass,
///
///   G = c (onehot − p) − e p (log p + H(p)) + a p (log p/q − KL(p ‖ q)) + b (p − q)
///
/// over the temperature. From hidden states the reference must be given with the scores, and where
/// there is none, entropies asked for if they have slopes; softcap and the linear head's filter are
/// refused.
///
/// Shapes: one row a token, and one label and one weight a token. With a shift, the last row of a
/// sequence predicts nothing, and its first token's label is not read: no sequence sees into the
/// next. Nor are labels and weights of padding. Rows that predict nothing that counts are not
/// computed, and their gradient is 0.
///
/// Special values: a sequence without tokens that count has the score 0 and no gradient, averaged
/// or not, whatever c; so have all sequences of a batch that is all masked. A token of probability
/// 0 makes its score -inf (+inf where its weight is below 0). NaN stays in its sequence, but for
/// gradients of weights, which all share. A class with the score -inf in both models is as if it
/// were not there. With p = 0 alone KL(q ‖ p) is +inf, and its gradient p − q as ever. With q = 0
/// alone KL(p ‖ q) is +inf and has no gradient: with a slope that is not 0, gradients that the row
/// has a part in are NaN or infinite; with a slope of 0 it does not show. From hidden states a
/// model's divergences from itself, and their gradients, are exactly 0.
///
/// Cost, from hidden states, N rows that count, D features, V classes: 2 N D V operations for the
/// scores, 6 N D V to go back: together those of the linear head where it holds a piece of scores
/// per thread, as this does (½ MiB; below some 16 thousand classes a block of 256 rows). About 90
/// bytes a row are kept of what is known of it. With a reference, whose scores cost as much, the
/// divergences come along in the same pass, and 32 bytes a row more are kept; going back with their
/// slopes makes the reference's scores again, of 128 classes at once: 132 KB a thread more, and 48
/// bytes a row. All in all 12 N D V operations instead of 8, and for 50257 classes in float
/// 0.98 MB a thread instead of 0.84, and 0.22 MB that threads share.
///
/// Accuracy: sums over a sequence are in double with their rounding errors kept, so that the error
/// of a score is that of the log-probabilities, which are cross_entropy's, in T. Divergences of
/// hidden states are differences of log-sum-exps: within a few ε of the scores' size, and not below
/// 0. Of G each term is within 4 ε (1 + |z| + |r|) of its size and p, r being the reference's
/// scores: what the rounding of scores does, and where p and q are nearly the same nothing cancels
/// on top of it. Same bits for any number of threads, and for ragged and padded. Scores and
/// d_scores are of T or double. Throws std::invalid_argument.
///
/// Source: Rafailov et al., "Direct preference optimization", 2023; Hsu et al., "Liger kernel",
/// 2024, whose chunks allow only for losses that take each pair by itself.
///
///   perdita::sequence_head<float> head({.average = true});
///   const auto layout = perdita::sequence_layout::ragged(offsets);
///   auto pass = head.scores(hidden, weights, labels, layout, scores);
///   … loss(scores, d_scores) …
///   pass.backward(d_scores, d_hidden, d_weights);
///   pass.backward(d_scores, d_hidden, d_weights, {.d_forward_kl = slopes});   // of each row
template <class T = float> class sequence_head {
public:
  using value_type = T;
  using options = sequence_options;
  static constexpr const char* name = core::sequence_head_name;

  sequence_head() : sequence_head(options{}) {}
  explicit sequence_head(const options& o)
      : options_(o), settings_{static_cast<T>(o.temperature), static_cast<T>(o.softcap), o.head} {
    core::invertible<T>(name, "temperature", o.temperature);
    core::require(o.softcap == 0 || core::is_invertible<T>(o.softcap), name, "softcap", o.softcap,
                  "0 for none, or a finite number whose inverse is finite");
    linear<cross_entropy<T>>(settings_.loss(), o.head); // checks the head's options
  }
  const options& settings() const { return options_; }

  /// Scores from log-probabilities (a vector) or from scores of classes (a matrix).
  template <class X, core::labels_like Y, core::vector_like S>
  requires core::vector_like<X> || core::scores_like<X, T>
  auto scores(X&& source, Y&& labels, const sequence_layout& layout, S&& scores,
              const sequence_call<T>& call = {}) const {
    if constexpr (core::vector_like<X>)
      return make(core::given_log_probabilities<T>{core::as_vector(source)}, labels, layout, scores,
                  call);
    else
      return make(
          core::given_scores<T, typename core::element_of<X>::type>{core::as_matrix(source)},
          labels, layout, scores, call);
  }
  /// Scores from hidden states and class weights, or affine(weights, bias).
  template <class X, class M, core::labels_like Y, core::vector_like S>
  requires core::scores_like<X, T>
  auto scores(X&& hidden, M&& weights, Y&& labels, const sequence_layout& layout, S&& scores,
              const sequence_call<T>& call = {}) const {
    auto w = core::weights_to_keep(weights);
    return make(
        core::hidden_states<T, typename core::element_of<X>::type, decltype(w)>{
            core::as_matrix(hidden), w},
        labels, layout, scores, call);
  }

  /// value = loss(scores, d_scores), both spans of doubles, the second to be filled with ∂value/∂s;
  /// and the gradients of what the scores are made from.
  template <class Loss, class X, core::labels_like Y, class G>
  auto operator()(Loss&& loss, X&& source, Y&& labels, const sequence_layout& layout, G&& gradient,
                  const sequence_call<T>& call = {}, const sequence_gradient<T>& how = {}) const {
    std::vector<double> s(static_cast<std::size_t>(layout.sequences())), d(s.size());
    const auto pass = scores(source, labels, layout, s, call);
    const auto value = loss(std::span<const double>(s), std::span<double>(d));
    pass.backward(d, gradient, how);
    return value;
  }
  template <class Loss, class X, class M, core::labels_like Y, class DX, class DM>
  auto operator()(Loss&& loss, X&& hidden, M&& weights, Y&& labels, const sequence_layout& layout,
                  DX&& d_hidden, DM&& d_weights, const sequence_call<T>& call = {},
                  const sequence_gradient<T>& how = {}) const {
    std::vector<double> s(static_cast<std::size_t>(layout.sequences())), d(s.size());
    const auto pass = scores(hidden, weights, labels, layout, s, call);
    const auto value = loss(std::span<const double>(s), std::span<double>(d));
    pass.backward(d, d_hidden, d_weights, how);
    return value;
  }

private:
  template <class Source, class Y, class S>
  auto make(Source source, Y& labels, const sequence_layout& layout, S& scores,
            const sequence_call<T>& call) const {
    using E = typename core::element_of<S>::type;
    static_assert(std::same_as<E, T> || std::same_as<E, double>,
                  "perdita::sequence_head: scores are of the head's type or double");
    const auto of = core::as_vector(labels);
    const auto to = core::as_vector(scores);
    core::require_size("size of labels", of, layout.rows(), "the rows of the layout");
    core::require_size("size of scores", to, layout.sequences(), "as many as there are sequences");
    const core::sequence_checks<T> checks{name};
    checks.size("rows", source.rows(), layout.rows(), "the rows of the layout");
    check_call(call, layout);
    source.check(settings_, call);
    core::sequence_tokens tokens{layout, options_.average};
    tokens.read(of, call.token_weights, options_.shift, options_.ignore_index, source.classes());
    std::vector<T> memory;
    const vector_view<const T> log_p = source.forward(settings_, tokens, call, memory);
    for (index i = 0; i < layout.sequences(); ++i) {
      to[i] = static_cast<E>(tokens.score(i, log_p));
      if (call.counts.data)
        call.counts[i] = tokens.counts[static_cast<std::size_t>(i)];
    }
    return sequence_pass<T, Source>(settings_, std::move(tokens), std::move(source), call);
  }
  static void check_call(const sequence_call<T>& c, const sequence_layout& layout) {
    const auto each = [](const char* what, const auto& view, index expected, const char* of) {
      if (view.data || view.size > 0) {
        core::require_size(what, view, expected, of);
        core::require_memory(core::sequence_head_name, what, view.data, view.size);
      }
    };
    const char* const rows = "the rows of the layout";
    each("size of token_weights", c.token_weights, layout.rows(), rows);
    each("size of target_log_probability", c.target_log_probability, layout.rows(), rows);
    each("size of log_sum_exp", c.log_sum_exp, layout.rows(), rows);
    each("size of entropy", c.entropy, layout.rows(), rows);
    each("size of reverse_kl", c.reverse_kl, layout.rows(), rows);
    each("size of forward_kl", c.forward_kl, layout.rows(), rows);
    each("size of reference_log_probability", c.reference_log_probability, layout.rows(), rows);
    each("size of counts", c.counts, layout.sequences(), "as many as there are sequences");
  }

  options options_;
  core::sequence_settings<T> settings_;
};

} // namespace perdita::inline PERDITA_ABI
