// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// The tags of a batch of sequences (sequences × steps) and how many steps of each count. Also
/// where decode() writes to.
template <class Y, class N> struct with_lengths {
  Y& tags;
  N& lengths;
  template <class A, class B> with_lengths(A&& t, B&& n) : tags(t), lengths(n) {}
};
template <class A, class B>
with_lengths(A&&, B&&) -> with_lengths<std::remove_reference_t<A>, std::remove_reference_t<B>>;

/// What a chain of tags is scored with besides its emissions; also where the gradients of that are
/// written to. `transitions` is tags × tags, (from, to); `start` and `end` are one number per tag.
/// A score left out is 0 everywhere, a gradient left out is not made.
template <class T> struct chain_scores {
  matrix_view<T> transitions;
  vector_view<T> start{};
  vector_view<T> end{};

  operator chain_scores<const T>() const requires(!std::is_const_v<T>) {
    return {transitions, start, end};
  }
};

namespace core {

// --- The chain -----------------------------------------------------------------------------------

/// A sum of images that is as large as this has lost nothing that counts to underflow.
inline constexpr double sure_image = 0x1p-500;

/// A chain's scores as the passes over a sequence want them, each table less its largest entry:
/// (from, to) and (to, from), as scores (-inf as padding) and as images e^score (1 as padding, so
/// that no sum seems lost).
struct chain_tables {
  index tags = 0, width = 0;
  double shift = 0, start_shift = 0, end_shift = 0; ///< what was taken off
  bool defined = true;
  double *score = nullptr, *score_back = nullptr;
  double *image = nullptr, *image_back = nullptr;
  double *start = nullptr, *end = nullptr;

  chain_tables(carver& c, index tag_count) : tags(tag_count), width(whole_packs(tag_count)) {
    for (double** table : {&score, &score_back, &image, &image_back})
      *table = c.take<double>(static_cast<std::size_t>(width * width));
    for (double** row : {&start, &end})
      *row = c.take<double>(static_cast<std::size_t>(width));
  }

  template <class T> void fill(const chain_scores<const T>& chain) {
    std::fill_n(score, width * width, no_score);
    for (index i = 0; i < tags; ++i)
      for (index j = 0; j < tags; ++j)
        score[i * width + j] = static_cast<double>(chain.transitions(i, j));
    defined = settle_scores(score, width * width);
    shift = lower_to_0(score, width * width);
    start_shift = copy(chain.start, start);
    end_shift = copy(chain.end, end);
    images_of(score, width * width, image);
    for (index i = 0; i < width; ++i)
      for (index j = 0; j < width; ++j) {
        if (i >= tags || j >= tags)
          image[i * width + j] = 1;
        score_back[j * width + i] = score[i * width + j];
        image_back[j * width + i] = image[i * width + j];
      }
  }

private:
  template <class T> double copy(const vector_view<const T>& from, double* to) {
    std::fill_n(to, width, no_score);
    for (index j = 0; j < tags; ++j)
      to[j] = from.data ? static_cast<double>(from[j]) : 0;
    defined = settle_scores(to, width) && defined;
    return lower_to_0(to, width);
  }
};

/// log Σ_i e^(x_i + score_ij) for every j from those sums of images, Σ_i p_i image_ij with p = e^x;
/// where these are too small to be sure that none was lost, the same in logarithms.
inline void take_logarithms(const chain_tables& chain, const double* x,
                            const double* score_of_column, double* sums) {
  using W = pack<double>;
  for (index j = 0; j < chain.width; j += per_pack) {
    const W sum = W::load(sums + j);
    log(sum).store(sums + j);
    if (!any(sum < W(sure_image))) [[likely]]
      continue;
    alignas(64) double s[lanes<double>];
    sum.store(s);
    for (index k = 0; k < per_pack; ++k)
      if (s[k] < sure_image)
        sums[j + k] = log_sum_exp_of(x, score_of_column + (j + k) * chain.width, chain.width);
  }
  std::fill(sums + chain.tags, sums + chain.width, no_score);
}

template <class T> struct crf_job {
  matrix_data<T> emissions;
  matrix_data<T, true> gradient;
  integer_rows tags, lengths;
  index sequences = 0, steps = 0;
  std::int64_t ignore_index = -100;
  const call_options<T>* call = nullptr;
  double share = 1;
  bool has_gradient = false, has_pairs = false;

  /// Steps that count: as given, or up to the first tag that is ignored, where there are tags.
  index length(index b) const {
    if (lengths.reader)
      return static_cast<index>(lengths.at(0, b));
    index n = 0;
    while (n < steps && !(tags.reader && tags.at(b, n) == ignore_index))
      ++n;
    return n;
  }
};

/// Gradients of a chain, of one part of the sequences.
struct chain_sums {
  double *pairs, *start, *end;
  chain_sums(double* numbers, index width)
      : pairs(numbers), start(pairs + width * width), end(start + width) {}
  static index size(index width) { return width * (width + 2); }
};

/// One worker's passes over sequences.
template <class T> class crf_pass {
  using W = pack<double>;
  static constexpr index steps_per_sum = 64;

public:
  crf_pass(carver& c, const crf_job<T>& job, const chain_tables& chain, index longest)
      : job_(job), chain_(chain), width_(chain.width) {
    const auto n = static_cast<std::size_t>(width_), most = static_cast<std::size_t>(longest);
    forward_ = c.take<double>((job.has_gradient ? most : 2) * n);
    surprise_ = c.take<double>(most);
    tags_ = c.take<std::int64_t>(most);
    outer_ = c.take<double>(job.has_pairs ? n * n : 0);
    for (double** row : {&emission_, &image_, &next_image_, &back_, &next_back_, &result_})
      *row = c.take<double>(n);
    buffer_ = c.take<T>(n);
  }

  /// The value of sequence b times its weight; its gradients, the chain's added to `sums`.
  double run(index b, const chain_sums& sums) {
    const index n = job_.length(b);
    const double weight = weight_of(*job_.call, b);
    const bool counts = weight != 0;
    double value = 0, log_sum_exp = 0;
    if (counts && n > 0) {
      job_.tags.read(b, 0, n, tags_);
      value = forward(b, n, log_sum_exp) * weight;
    }
    if (job_.call->values.data)
      job_.call->values[b] = static_cast<T>(value);
    if (job_.call->log_sum_exp.data)
      job_.call->log_sum_exp[b] = static_cast<T>(log_sum_exp);
    if (!job_.has_gradient)
      return value;
    const index used = counts ? n : 0;
    if (used > 0) {
      scale_ =
          static_cast<double>(job_.call->scale) * job_.share * weight * upstream_of(*job_.call, b);
      if (defined_)
        backward(b, n, sums);
      else
        lose(b, n, sums);
    }
    if (!job_.call->accumulate) {
      std::fill_n(result_, width_, 0.0);
      for (index t = used; t < job_.steps; ++t)
        write_row(job_.gradient, b * job_.steps + t, result_, false, buffer_);
    }
    return value;
  }

private:
  index tag(index t) const { return static_cast<index>(tags_[t]); }
  double* forward_row(index t) const { return forward_ + (job_.has_gradient ? t : t % 2) * width_; }
  /// Less their largest, which is returned.
  double read_emission(index b, index t) {
    read_row(job_.emissions, b * job_.steps + t, buffer_, emission_);
    defined_ = settle_scores(emission_, width_) && defined_;
    return lower_to_0(emission_, width_);
  }

  /// Rows log Σ e^score of the paths to each tag, less the largest; the value is
  /// Σ_t −log p(y_t | y_{t+1}, x_0 … x_t), whose terms do not cancel.
  double forward(index b, index n, double& log_sum_exp) {
    defined_ = chain_.defined;
    exact_sum value, offset;
    for (index t = 0; t < n; ++t) {
      offset.add(read_emission(b, t));
      if (!defined_)
        return log_sum_exp = std::numeric_limits<double>::quiet_NaN();
      double* const row = forward_row(t);
      offset.add(t == 0 ? chain_.start_shift : chain_.shift);
      if (t == 0) {
        std::copy_n(chain_.start, width_, row);
      } else {
        const double* const before = forward_row(t - 1);
        surprise_[t] = surprise_of(before, chain_.score_back + tag(t) * width_, width_, tag(t - 1));
        value.add(surprise_[t]);
        images_of(before, width_, image_);
        multiply_rows(image_, chain_.image, chain_.tags, width_, row);
        take_logarithms(chain_, before, chain_.score_back, row);
      }
      for (index j = 0; j < width_; j += per_pack)
        (W::load(row + j) + W::load(emission_ + j)).store(row + j);
      offset.add(lower_to_0(row, width_));
    }
    const double* const last = forward_row(n - 1);
    value.add(surprise_of(last, chain_.end, width_, tag(n - 1)));
    offset.add(chain_.end_shift);
    offset.add(log_sum_exp_of(last, chain_.end, width_));
    log_sum_exp = offset.value();
    return value.value();
  }

  /// From the last step on, `back_` being log Σ e^score of what follows each tag.
  void backward(index b, index n, const chain_sums& sums) {
    std::copy_n(chain_.end, width_, back_);
    clear_outer();
    for (index t = n - 1; t >= 0; --t) {
      const double hit = marginals(forward_row(t), tag(t));
      if (t == n - 1)
        add(result_, sums.end);
      if (t == 0)
        add(result_, sums.start);
      read_emission(b, t); // before the gradient, which may lie on it
      write_row(job_.gradient, b * job_.steps + t, result_, job_.call->accumulate, buffer_);
      if (t == 0)
        break;
      for (index j = 0; j < width_; j += per_pack)
        (W::load(back_ + j) + W::load(emission_ + j)).store(back_ + j);
      lower_to_0(back_, width_);
      images_of(back_, width_, next_image_);
      multiply_rows(next_image_, chain_.image_back, chain_.tags, width_, next_back_);
      if (job_.has_pairs)
        add_pairs(t, hit, sums);
      take_logarithms(chain_, back_, chain_.score, next_back_);
      lower_to_0(next_back_, width_);
      std::swap(back_, next_back_);
      if (t % steps_per_sum == 0)
        flush_outer(sums);
    }
    flush_outer(sums);
  }

  /// result = scale (p_j − [j is the tag]), with the digits of 1 − p; returns p of the tag.
  double marginals(const double* row, index y) {
    for (index j = 0; j < width_; j += per_pack)
      (W::load(row + j) + W::load(back_ + j)).store(result_ + j);
    lower_to_0(result_, width_);
    const double sum = images_of(result_, width_, result_);
    const double share = sum > 0 ? 1 / sum : 0, own = result_[y];
    result_[y] = 0;
    W rivals(0);
    for (index j = 0; j < width_; j += per_pack) {
      const W p = W::load(result_ + j) * share;
      rivals += p;
      (p * scale_).store(result_ + j);
    }
    miss_ = sum > 0 ? sum_lanes(rivals) : 1;
    result_[y] = -(scale_ * miss_);
    return own * share;
  }

  /// Adds the pairs (t − 1, t), `next_back_` being Σ_j image_ij e^back_j: p_ij = e^(forward_i +
  /// score_ij + back_j) / Σ, less 1 at the tags.
  void add_pairs(index t, double hit, const chain_sums& sums) {
    const double* const before = forward_row(t - 1);
    const index y = tag(t - 1), next = tag(t), at = y * width_ + next;
    images_of(before, width_, image_);
    // 1 − p(y, next) = 1 − p(next) + p(next) (1 − p(y | next))
    const double left = -first_lane(expm1(W(-surprise_[t])));
    const double own = fma_of(hit, left, miss_);
    W total(0);
    for (index i = 0; i < width_; i += per_pack)
      total = fma(W::load(image_ + i), W::load(next_back_ + i), total);
    const double sum = sum_lanes(total);
    if (sum < sure_image) {
      add_pairs_by_logarithms(before, at, sums);
    } else {
      const double kept = outer_[at], factor = scale_ / sum;
      for (index i = 0; i < chain_.tags; ++i) {
        const W u(image_[i] * factor);
        double* const row = outer_ + i * width_;
        for (index j = 0; j < width_; j += per_pack)
          fma(u, W::load(next_image_ + j), W::load(row + j)).store(row + j);
      }
      outer_[at] = kept;
    }
    sums.pairs[at] = fma_of(-scale_, own, sums.pairs[at]);
  }
  /// The same where images are too small: rare, and slow.
  void add_pairs_by_logarithms(const double* before, index at, const chain_sums& sums) {
    double top = no_score, sum = 0;
    for (index i = 0; i < chain_.tags; ++i)
      top = std::max(top, before[i] + largest_sum(chain_.score + i * width_, back_, width_));
    if (top == no_score)
      return;
    const auto images = [&](index i, index j) {
      return exp_shifted(W::load(chain_.score + i * width_ + j) + W::load(back_ + j) +
                         (before[i] - top));
    };
    for (index i = 0; i < chain_.tags; ++i)
      for (index j = 0; j < width_; j += per_pack)
        sum += sum_lanes(images(i, j));
    const double kept = sums.pairs[at];
    for (index i = 0; i < chain_.tags; ++i)
      for (index j = 0; j < width_; j += per_pack) {
        double* const to = sums.pairs + i * width_ + j;
        fma(images(i, j), W(scale_ / sum), W::load(to)).store(to);
      }
    sums.pairs[at] = kept;
  }
  void clear_outer() {
    if (job_.has_pairs)
      std::fill_n(outer_, width_ * width_, 0.0);
  }
  /// A few steps at a time, so that the sum of a long sequence keeps its digits.
  void flush_outer(const chain_sums& sums) {
    if (!job_.has_pairs)
      return;
    for (index i = 0; i < chain_.tags * width_; i += per_pack)
      fma(W::load(outer_ + i), W::load(chain_.image + i), W::load(sums.pairs + i))
          .store(sums.pairs + i);
    clear_outer();
  }
  void add(const double* from, double* to) {
    for (index j = 0; j < width_; j += per_pack)
      (W::load(to + j) + W::load(from + j)).store(to + j);
  }
  /// Not a number, anywhere in the sequence or the chain: neither are its gradients.
  void lose(index b, index n, const chain_sums& sums) {
    std::fill_n(result_, width_, std::numeric_limits<double>::quiet_NaN());
    for (index t = 0; t < n; ++t)
      write_row(job_.gradient, b * job_.steps + t, result_, job_.call->accumulate, buffer_);
    add(result_, sums.start);
    add(result_, sums.end);
    for (index i = 0; n > 1 && job_.has_pairs && i < chain_.tags; ++i)
      add(result_, sums.pairs + i * width_);
  }

  const crf_job<T>& job_;
  const chain_tables& chain_;
  index width_;
  double *forward_, *surprise_, *outer_;
  std::int64_t* tags_;
  double *emission_, *image_, *next_image_, *back_, *next_back_, *result_;
  T* buffer_;
  bool defined_ = true;
  double scale_ = 1, miss_ = 0;
};

/// One worker's search for best paths.
template <class T> class crf_decoder {
  using W = pack<double>;

public:
  crf_decoder(carver& c, const crf_job<T>& job, const chain_tables& chain, index longest)
      : job_(job), chain_(chain), width_(chain.width) {
    const auto n = static_cast<std::size_t>(width_);
    from_ = c.take<double>(static_cast<std::size_t>(longest) * n);
    for (double** row : {&emission_, &best_, &next_})
      *row = c.take<double>(n);
    buffer_ = c.take<T>(n);
  }

  /// write(t, tag) from the last step to the first; the path's score.
  template <class F> double run(index b, F write) {
    const index n = job_.length(b);
    if (n == 0)
      return 0;
    bool defined = chain_.defined;
    exact_sum offset;
    for (index t = 0; t < n; ++t) {
      read_row(job_.emissions, b * job_.steps + t, buffer_, emission_);
      defined = settle_scores(emission_, width_) && defined;
      offset.add(lower_to_0(emission_, width_));
      offset.add(t == 0 ? chain_.start_shift : chain_.shift);
      if (t == 0)
        std::copy_n(chain_.start, width_, best_);
      else
        advance(from_ + t * width_);
      for (index j = 0; j < width_; j += per_pack)
        (W::load(best_ + j) + W::load(emission_ + j)).store(best_ + j);
      offset.add(lower_to_0(best_, width_));
    }
    for (index j = 0; j < width_; j += per_pack)
      (W::load(best_ + j) + W::load(chain_.end + j)).store(best_ + j);
    const double top = defined ? largest_of(best_, width_) : no_score;
    offset.add(chain_.end_shift);
    offset.add(top);
    index at = 0;
    while (top != no_score && best_[at] != top)
      ++at;
    for (index t = n - 1; t >= 0; --t) {
      write(t, at);
      if (t > 0)
        at = top == no_score ? 0 : static_cast<index>(from_[t * width_ + at]);
    }
    return defined ? offset.value() : std::numeric_limits<double>::quiet_NaN();
  }

private:
  /// best_j = max_i (best_i + score_ij), and the first i that attains it.
  void advance(double* from) {
    for (index j = 0; j < chain_.width; j += per_pack) {
      W top = W(best_[0]) + W::load(chain_.score + j), first(0);
      for (index i = 1; i < chain_.tags; ++i) {
        const W s = W(best_[i]) + W::load(chain_.score + i * width_ + j);
        const auto better = s > top;
        top = select(better, s, top);
        first = select(better, W(static_cast<double>(i)), first);
      }
      top.store(next_ + j);
      first.store(from + j);
    }
    std::swap(best_, next_);
  }

  const crf_job<T>& job_;
  const chain_tables& chain_;
  index width_;
  double *from_, *emission_, *best_, *next_;
  T* buffer_;
};

} // namespace core

/// Linear-chain conditional random field: the negative log-likelihood of sequences of tags.
///
///   score(y) = start_{y_0} + Σ_t E_{t,y_t} + Σ_{t>0} A_{y_{t-1},y_t} + end_{y_last}
///   ℓ = log Σ_{all paths} e^score − score(y)
///   ∂ℓ/∂E_tj = P(y_t = j) − [y_t = j],   ∂ℓ/∂A_ij = Σ_t P(y_{t-1} = i, y_t = j) − counts,
///   ∂ℓ/∂start, ∂ℓ/∂end: those of the first and of the last step
///
/// Shapes: emissions (sequences · steps) × tags, step t of sequence b being row b·steps + t, of T
/// or (for float) of 16 bits. That is a packed tensor sequences × steps × tags as it lies; one with
/// the steps first is a matrix_view with plane_rows = steps, plane_stride = tags and row_stride =
/// sequences · tags. Tags: sequences × steps, of any integral type. The chain: of T.
///
/// Lengths: with_lengths(tags, lengths) gives one for each sequence; tags after it are not looked
/// at. Without, a sequence ends before its first tag ignore_index. Steps after the end have the
/// gradient 0 and are not read. Length 0: value 0; such a sequence counts in the mean.
///
/// Reduction over sequences, weights, by-products (values, log_sum_exp = log Σ e^score): as in
/// call_options, a sequence being a row; the mean per tag is reduction::mean with the number of
/// tags as normaliser. call_options::accumulate is for the emissions' gradient, which may lie on
/// the emissions; accumulate_chain for the chain's.
///
/// Special values: -inf (or below −2^1000) is masked: probability 0. Where the tags' own path is
/// masked the value is +inf and the gradient what the formula says; so where every path is, with
/// all P = 0. NaN, +inf or a score above 2^1000 in a sequence: NaN in its value and in its
/// emissions' gradient, and in no other sequence's; in the chain's gradients, which are sums over
/// sequences, NaN everywhere. NaN in the chain is NaN in all. What a removed sequence (weight 0) or
/// step has is not looked at.
///
/// Accuracy: computed in double. The value is Σ_t −log P(y_t | y_{t+1}, scores up to t), which does
/// not cancel: a sure sequence keeps its digits, as do the gradients of its tags. Paths are summed
/// as products of e^score, and in logarithms where those are too small: scores of any size do. Same
/// bits for any number of threads. Memory: steps × tags doubles for each thread that works.
///
/// Throws std::invalid_argument. Cost: steps × tags² multiply-adds, three times with the gradients.
/// Source: Lafferty, McCallum, Pereira, "Conditional random fields", 2001; Rabiner, "A tutorial on
/// hidden Markov models", 1989 (forward-backward, Viterbi).
///
///   perdita::linear_chain_crf<float> crf;
///   float value = crf(emissions, {transitions, start, end}, tags,
///                     d_emissions, {d_transitions, d_start, d_end});
///   crf.decode(emissions, {transitions, start, end}, perdita::with_lengths(paths, lengths));
template <class T = float> class linear_chain_crf {
public:
  using value_type = T;
  struct options {
    std::int64_t ignore_index = -100; ///< ends a sequence; decode() writes it after the end
    perdita::reduction reduction = perdita::reduction::mean;
    bool accumulate_chain = false; ///< adds to the gradients of transitions, start and end
  };
  static constexpr const char* name = "linear_chain_crf";

  linear_chain_crf() : linear_chain_crf(options{}) {}
  explicit(false) linear_chain_crf(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value. `tags` is a matrix, or with_lengths(matrix, vector).
  template <class X, class Y>
  requires core::scores_like<X, T> T operator()(X&& emissions, const chain_scores<const T>& chain,
                                                Y&& tags, const call_options<T>& call = {}) const {
    core::crf_job<T> job;
    set_inputs(job, core::as_matrix(emissions), chain, tags, call);
    check_tags(job);
    return run(job, chain, chain_scores<T>{});
  }

  /// The reduced value, and its gradients, written or added to the last two.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& emissions, const chain_scores<const T>& chain, Y&& tags, G&& d_emissions,
                   const chain_scores<T>& d_chain, const call_options<T>& call = {}) const {
    core::crf_job<T> job;
    set_inputs(job, core::as_matrix(emissions), chain, tags, call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(d_emissions));
    job.has_gradient = true;
    job.has_pairs = d_chain.transitions.data != nullptr;
    checks.gradient(job.emissions, job.gradient, call.accumulate);
    check_chain("gradient of ", d_chain, job.emissions.cols, false);
    check_apart(job, d_chain);
    check_tags(job);
    return run(job, chain, d_chain);
  }

  /// The best path of every sequence (Viterbi), written to `paths`: a matrix of integers, sequences
  /// × steps, or with_lengths of one. After the end comes ignore_index; of equal paths, the first
  /// (by its last tag, then the one before, …). call_options::values: the paths' scores. No path
  /// that is not masked: the score is -inf, and any path. NaN: the score is NaN, and any path.
  /// row_weights, upstream, normaliser and log_sum_exp belong to the loss, and are refused.
  template <class X, class P>
  requires core::scores_like<X, T>
  void decode(X&& emissions, const chain_scores<const T>& chain, P&& paths,
              const call_options<T>& call = {}) const {
    core::crf_job<T> job;
    set_inputs(job, core::as_matrix(emissions), chain, paths, call);
    checks.search(call);
    job.tags = {}; // nothing that could be read
    const auto out = core::as_matrix(rows_of(paths));
    search(job, chain, [&](index b, index t, std::int64_t tag) {
      out(b, t) = static_cast<std::remove_reference_t<decltype(out(0, 0))>>(tag);
    });
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class Y> struct is_with_lengths : std::false_type {};
  template <class Y, class N> struct is_with_lengths<with_lengths<Y, N>> : std::true_type {};
  template <class Y> static auto& rows_of(Y& tags) {
    if constexpr (is_with_lengths<std::remove_cvref_t<Y>>::value)
      return tags.tags;
    else
      return tags;
  }

  template <class S, class Y>
  void set_inputs(core::crf_job<T>& job, matrix_view<S> emissions,
                  const chain_scores<const T>& chain, Y& tags, const call_options<T>& call) const {
    auto& rows = rows_of(tags);
    static_assert(core::label_rows<decltype(rows)>,
                  "perdita::linear_chain_crf: tags and paths are matrices of integers, sequences × "
                  "steps, or with_lengths(matrix, vector)");
    const auto table = core::as_matrix(rows);
    job.emissions = core::matrix_data<T>(emissions);
    job.tags = core::integer_rows(table);
    job.sequences = table.rows;
    job.steps = table.cols;
    job.ignore_index = options_.ignore_index;
    job.call = &call;
    core::require(table.plane_rows == table.rows, name, "plane_rows of the tags", table.plane_rows,
                  "all rows in one plane");
    checks.size("emission rows", emissions.rows, job.sequences * job.steps, "sequences × steps");
    checks.memory("emissions", emissions.data, emissions.rows * emissions.cols);
    checks.memory("tags", table.data, table.rows * table.cols);
    if (emissions.rows > 0)
      core::require(emissions.cols > 0, name, "columns", emissions.cols, "at least 1 tag");
    if constexpr (is_with_lengths<std::remove_cvref_t<Y>>::value)
      set_lengths(job, core::as_vector(tags.lengths));
    check_chain("", chain, emissions.cols, true);
    checks.call(call, job.sequences, true);
  }
  template <class I> void set_lengths(core::crf_job<T>& job, vector_view<I> lengths) const {
    static_assert(core::label_type<I>, "perdita::linear_chain_crf: lengths are integers");
    checks.size("size of lengths", lengths.size, job.sequences, "as many as there are sequences");
    checks.memory("lengths", lengths.data, lengths.size);
    job.lengths = core::integer_rows(lengths);
    for (index b = 0; b < job.sequences; ++b)
      if (const std::int64_t n = job.lengths.at(0, b); n < 0 || n > job.steps)
        core::fail_at(name, "lengths", b, core::to_text(n), "0 to " + core::to_text(job.steps));
  }
  template <class S>
  void check_chain(const char* whose, const chain_scores<S>& chain, index tags,
                   bool needs_transitions) const {
    const auto check = [&](const char* what, index got) {
      checks.size((std::string(whose) + what).c_str(), got, tags, "the number of tags");
    };
    const auto& a = chain.transitions;
    if (needs_transitions || a.data || a.rows * a.cols > 0) {
      check("transition rows", a.rows);
      check("transition columns", a.cols);
      checks.memory("transitions", a.data, a.rows * a.cols);
    }
    for (const auto& [what, v] : {std::pair{"start", chain.start}, std::pair{"end", chain.end}})
      if (v.data || v.size > 0) {
        check(what, v.size);
        checks.memory(what, v.data, v.size);
      }
  }
  /// The chain's gradients apart from each other and from what has emissions' shape.
  void check_apart(const core::crf_job<T>& job, const chain_scores<T>& d_chain) const {
    const auto extent = [](const auto& m) {
      return m && m.rows * m.cols > 0 ? core::bytes_of(m) : core::extent{0, 0};
    };
    const auto vector = [&](const vector_view<T>& v) {
      return extent(core::matrix_data<T, true>(matrix_view<T>(v.data, 1, v.size, 0, v.stride)));
    };
    const std::pair<const char*, core::extent> all[] = {
        {"gradient of the transitions", extent(core::matrix_data<T, true>(d_chain.transitions))},
        {"gradient of the start", vector(d_chain.start)},
        {"gradient of the end", vector(d_chain.end)},
        {"gradient of the emissions", extent(job.gradient)},
        {"emissions", extent(job.emissions)}};
    for (int i = 0; i < 3; ++i)
      for (int j = i + 1; j < 5; ++j)
        if (all[i].second.begin < all[j].second.end && all[j].second.begin < all[i].second.end)
          core::fail(std::string("perdita::") + name + ": " + all[i].first + " overlaps " +
                     all[j].first + ", expected memory apart");
  }
  /// Of every tag that counts.
  void check_tags(const core::crf_job<T>& job) const {
    const index tags = job.emissions.cols;
    for (index b = 0; b < job.sequences; ++b) {
      const index n = job.length(b);
      for (index t = 0; t < job.steps; ++t) {
        const std::int64_t y = job.tags.at(b, t);
        if (t < n && (y < 0 || y >= tags))
          core::fail_at(name, "tags", b * job.steps + t, core::to_text(y),
                        "0 to " + core::to_text(tags - 1));
        if (t >= n && !job.lengths.reader && y != options_.ignore_index)
          core::fail_at(name, "tags", b * job.steps + t, core::to_text(y),
                        "ignore_index " + core::to_text(options_.ignore_index) +
                            ", as after the first such tag there is no other");
      }
    }
  }

  index longest(const core::crf_job<T>& job) const {
    index most = 0;
    for (index b = 0; b < job.sequences; ++b)
      most = std::max(most, job.length(b));
    return most;
  }
  T run(core::crf_job<T>& job, const chain_scores<const T>& chain,
        const chain_scores<T>& d_chain) const;
  void write_chain(const core::chain_tables& tables, const double* parts, index count,
                   const chain_scores<T>& d_chain) const;
  template <class Write>
  void search(core::crf_job<T>& job, const chain_scores<const T>& chain, Write write) const;

  options options_;
};

template <class T>
T linear_chain_crf<T>::run(core::crf_job<T>& job, const chain_scores<const T>& chain,
                           const chain_scores<T>& d_chain) const {
  const call_options<T>& call = *job.call;
  const index n = job.sequences, most = longest(job), tags = job.emissions.cols;
  job.share = core::share_of(call, options_.reduction, n);
  // As many parts as 64 MiB take: what is summed in which order depends on the shape alone.
  constexpr index most_parts = 64, doubles = index{1} << 23;
  const index part = core::chain_sums::size(core::whole_packs(tags));
  const index parts =
      std::min(n, std::clamp<index>(doubles / std::max<index>(part, 1), 1, most_parts));
  const auto workers = std::min(static_cast<std::size_t>(parts), call.run_on.concurrency());

  const auto of_parts = static_cast<std::size_t>(job.has_gradient ? parts * part : 0);
  core::carver count;
  const core::chain_tables no_tables(count, tags);
  count.template take<double>(static_cast<std::size_t>(n));
  count.template take<double>(of_parts);
  const std::size_t shared = count.used();
  core::crf_pass<T>(count, job, no_tables, most);
  const std::size_t scratch = count.used() - shared;

  workspace own;
  std::byte* const bytes = (call.memory ? *call.memory : own).request(shared + workers * scratch);
  core::carver carve(bytes);
  core::chain_tables tables(carve, tags);
  tables.fill(chain);
  double* const values = carve.template take<double>(static_cast<std::size_t>(n));
  double* const sums = carve.template take<double>(of_parts);
  std::fill_n(sums, of_parts, 0.0);
  core::share_out(parts, workers, call.run_on, [&](std::size_t worker) {
    core::carver mine(bytes + shared + worker * scratch);
    return [&, pass = core::crf_pass<T>(mine, job, tables, most)](index p) mutable {
      const core::chain_sums into(sums + (job.has_gradient ? p * part : 0), tables.width);
      for (index b = n * p / parts; b < n * (p + 1) / parts; ++b)
        values[b] = pass.run(b, into);
    };
  });
  if (job.has_gradient)
    write_chain(tables, sums, parts, d_chain);
  core::exact_sum total;
  for (index b = 0; b < n; ++b)
    total.add(values[b]);
  return static_cast<T>(job.share == 0 ? 0 : total.value() * job.share);
}

template <class T>
void linear_chain_crf<T>::write_chain(const core::chain_tables& tables, const double* parts,
                                      index count, const chain_scores<T>& d_chain) const {
  const index width = tables.width, part = core::chain_sums::size(width);
  const auto put = [&](T& to, index at) {
    double sum = 0;
    for (index p = 0; p < count; ++p)
      sum += parts[p * part + at];
    to = static_cast<T>(options_.accumulate_chain ? static_cast<double>(to) + sum : sum);
  };
  for (index i = 0; i < tables.tags; ++i) {
    for (index j = 0; d_chain.transitions.data && j < tables.tags; ++j)
      put(d_chain.transitions(i, j), i * width + j);
    if (d_chain.start.data)
      put(d_chain.start[i], width * width + i);
    if (d_chain.end.data)
      put(d_chain.end[i], width * (width + 1) + i);
  }
}

template <class T>
template <class Write>
void linear_chain_crf<T>::search(core::crf_job<T>& job, const chain_scores<const T>& chain,
                                 Write write) const {
  const call_options<T>& call = *job.call;
  const index n = job.sequences, most = longest(job), tags = job.emissions.cols;
  const auto workers = std::min(static_cast<std::size_t>(n), call.run_on.concurrency());
  core::carver count;
  const core::chain_tables no_tables(count, tags);
  const std::size_t shared = count.used();
  core::crf_decoder<T>(count, job, no_tables, most);
  const std::size_t scratch = count.used() - shared;

  workspace own;
  std::byte* const bytes = (call.memory ? *call.memory : own).request(shared + workers * scratch);
  core::carver carve(bytes);
  core::chain_tables tables(carve, tags);
  tables.fill(chain);
  core::share_out(n, workers, call.run_on, [&](std::size_t worker) {
    core::carver mine(bytes + shared + worker * scratch);
    return [&, decoder = core::crf_decoder<T>(mine, job, tables, most)](index b) mutable {
      const double score = decoder.run(b, [&](index t, index tag) { write(b, t, tag); });
      for (index t = job.length(b); t < job.steps; ++t)
        write(b, t, options_.ignore_index);
      if (call.values.data)
        call.values[b] = static_cast<T>(score);
    };
  });
}

} // namespace perdita::inline PERDITA_ABI
