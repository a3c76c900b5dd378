// SPDX-License-Identifier: MIT
//
// Preference optimisation without a language model to download: word_model's learns a text, and is
// then taught to prefer what stands there to the same words in another order, by DPO, SimPO, ORPO
// or KTO. Log-probabilities of whole sequences, and the gradients of the hidden states and of the
// last layer, are perdita::sequence_head's, which never holds the scores of the words.
//
// The rejected is a shuffle of the chosen, and no other place of the text: the two have the same
// words, so that frequencies tell nothing, and much of their gradients in common. That is when what
// pushes one down takes the other along, which is called gradient entanglement.
//
// Read first: tutor::learn, below. word_learner.hpp has the language model.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <perdita/sequence.hpp>

#include <perdita/preference/dpo.hpp>
#include <perdita/preference/entanglement.hpp>
#include <perdita/preference/reference_free.hpp>
#include <perdita/preference/unpaired.hpp>

#include "generator.hpp"
#include "line_chart.hpp"
#include "progress.hpp"
#include "word_learner.hpp"
#include "word_options.hpp"
#include "words.hpp"

// ---- Losses: of the scores of chosen sequences, followed by those of as many rejected.

/// log π and log π_ref of sequences.
struct scored {
  std::vector<double> policy, reference;
  double divergence = 0; ///< KL(π ‖ π_ref) per word
};

/// One number per pair; rewards as scores lie: of the chosen, then of the rejected.
struct by_products {
  std::vector<double> rewards, margins, accuracies;
  explicit by_products(std::size_t pairs) : rewards(2 * pairs), margins(pairs), accuracies(pairs) {}
};

/// The loss; writes its slopes by the policy's scores, and by-products.
using preference = std::function<double(const scored& of, double baseline, int length,
                                        std::span<double> slopes, by_products& out)>;

template <class Loss> preference of_pairs(Loss loss) {
  return [loss](const scored& of, double, int length, std::span<double> slopes, by_products& out) {
    const std::size_t n = of.policy.size() / 2;
    const std::span policy(of.policy), reference(of.reference);
    const std::span rewards(out.rewards);
    const std::vector<int> lengths(n, length);
    return loss({.chosen = policy.first(n),
                 .rejected = policy.last(n),
                 .chosen_reference = reference.first(n),
                 .rejected_reference = reference.last(n),
                 .chosen_lengths = lengths,
                 .rejected_lengths = lengths},
                slopes.first(n), slopes.last(n), {},
                {.chosen_rewards = rewards.first(n),
                 .rejected_rewards = rewards.last(n),
                 .margins = out.margins,
                 .accuracies = out.accuracies});
  };
}

/// KTO takes each sequence by itself; that they come in pairs matters to the by-products only.
double unpaired(const scored& of, double baseline, int, std::span<double> slopes,
                by_products& out) {
  const std::size_t n = of.policy.size() / 2;
  std::vector<int> desirable(n, 1);
  desirable.resize(2 * n, 0);
  const perdita::kto<double> loss;
  const double value = loss({.policy = of.policy, .reference = of.reference}, desirable, baseline,
                            slopes, {}, {.rewards = out.rewards});
  for (std::size_t i = 0; i < n; ++i) {
    out.margins[i] = out.rewards[i] - out.rewards[n + i];
    out.accuracies[i] = out.margins[i] > 0;
  }
  return value;
}

struct method {
  std::string_view name;
  preference loss;
  bool has_baseline = false;
};

/// With the options of the papers.
std::vector<method> methods() {
  return {{"dpo", of_pairs(perdita::dpo<double>())},
          {"simpo", of_pairs(perdita::simpo<double>())},
          {"orpo", of_pairs(perdita::orpo<double>())},
          {"kto", unpaired, true}};
}

// ---- Pairs

/// Sequences of words, all of one length, each with the words before it: as a text of its own.
struct sequences {
  std::vector<word_number> words, labels; ///< prompts too; the sequences alone
  std::vector<position> positions;        ///< of the sequences' words

  void add(std::span<const word_number> prompt, std::span<const word_number> sequence) {
    words.insert(words.end(), prompt.begin(), prompt.end());
    for (const word_number word : sequence) {
      positions.push_back(static_cast<position>(words.size()));
      words.push_back(word);
      labels.push_back(word);
    }
  }
};

/// What stands in the text, the same words shuffled, and, for KTO's baseline, both with the prompt
/// of another.
struct pairs {
  sequences real, mismatched;
};

class pair_source {
public:
  pair_source(const corpus& text, int context, int length, std::uint64_t seed)
      : text_(text), context_(static_cast<std::size_t>(context)),
        length_(static_cast<std::size_t>(length)), random_(seed) {}

  /// n pairs from anywhere in the training part.
  pairs training(int n) { return make(n, context_, text_.training); }
  pairs held_out(int n) { return make(n, text_.training + context_, text_.words.size()); }

private:
  using words = std::span<const word_number>;

  pairs make(int n, std::size_t begin, std::size_t end) {
    std::vector<words> prompts, continuations;
    std::vector<std::vector<word_number>> shuffled;
    const int places = static_cast<int>(end - begin - length_ + 1);
    int refused = 0;
    while (prompts.size() < static_cast<std::size_t>(n)) {
      const std::size_t at = begin + static_cast<std::size_t>(random_.below(places));
      const words continuation = words(text_.words).subspan(at, length_);
      if (std::count(continuation.begin(), continuation.end(), continuation[0]) ==
          static_cast<std::ptrdiff_t>(length_)) {
        // The same word all over, a dotted line say: it has no other order.
        if (++refused > 100 * n)
          throw std::runtime_error("the text repeats one word, expected words to shuffle");
        continue;
      }
      prompts.push_back(words(text_.words).subspan(at - context_, context_));
      continuations.push_back(continuation);
      shuffled.push_back(shuffle(continuation));
    }
    prompts.insert(prompts.end(), prompts.begin(), prompts.begin() + n);
    continuations.insert(continuations.end(), shuffled.begin(), shuffled.end());
    pairs result;
    const auto all = static_cast<perdita::index>(prompts.size());
    for (perdita::index i = 0; i < all; ++i) {
      const auto own = static_cast<std::size_t>(i),
                 other = static_cast<std::size_t>(perdita::mismatched(i, all));
      result.real.add(prompts[own], continuations[own]);
      result.mismatched.add(prompts[own], continuations[other]);
    }
    return result;
  }
  /// Another order of the same words.
  std::vector<word_number> shuffle(words of) {
    std::vector<word_number> result(of.begin(), of.end());
    do {
      for (std::size_t i = result.size(); i > 1; --i)
        std::swap(result[i - 1],
                  result[static_cast<std::size_t>(random_.below(static_cast<int>(i)))]);
    } while (std::equal(result.begin(), result.end(), of.begin()));
    return result;
  }

  const corpus& text_;
  std::size_t context_, length_;
  generator random_;
};

// ---- The policy and its reference

/// What is printed of held-out pairs.
struct figures {
  double loss, margin, accuracy, chosen, rejected, divergence;
  perdita::entanglement kind; ///< see entangled()
};

class tutor {
public:
  /// The policy starts as a copy of the reference.
  tutor(const model& reference, const method& chosen, int length)
      : reference_layers_(reference.layers()), layers_(reference.layers()),
        reference_last_(reference.layer()), last_(reference.layer()), method_(chosen),
        length_(length) {}

  /// One step on a batch; its loss before that.
  double learn(const pairs& batch, float rate) {
    const double z0 = method_.has_baseline ? baseline(batch.mismatched) : 0;
    const matrix& hidden = layers_.forward(batch.real.words, batch.real.positions);
    scored of;
    const auto call = compare_with_reference(batch.real);
    // What is known of the reference comes along with the policy's log-probabilities. Once these
    // are there, the loss says how the score of each sequence should move, and with that the head
    // goes back to hidden states and weights.
    const auto loss = [&](std::span<const double> scores, std::span<double> slopes) {
      of.policy.assign(scores.begin(), scores.end());
      of.reference = sums(reference_rows_);
      by_products unused(scores.size() / 2);
      return method_.loss(of, z0, length_, slopes, unused);
    };
    matrix d_hidden(hidden.rows(), hidden.cols());
    const double value = head_(loss, hidden, last_.values(), batch.real.labels, layout(batch.real),
                               d_hidden, last_.gradients(), call);
    last_.learn(rate);
    layers_.learn(d_hidden, rate);
    return value;
  }

  figures evaluate(const pairs& batch) {
    const scored of = score(batch.real);
    const std::size_t n = of.policy.size() / 2;
    std::vector<double> slopes(2 * n);
    by_products of_pairs(n);
    const double z0 = method_.has_baseline ? baseline(batch.mismatched) : 0;
    const double loss = method_.loss(of, z0, length_, slopes, of_pairs);
    const std::span policy(of.policy);
    return {loss,
            mean(of_pairs.margins),
            mean(of_pairs.accuracies),
            mean(policy.first(n)),
            mean(policy.last(n)),
            of.divergence,
            entangled(batch.real, slopes)};
  }

private:
  static double mean(std::span<const double> of) {
    return std::accumulate(of.begin(), of.end(), 0.0) / static_cast<double>(of.size());
  }
  perdita::sequence_layout layout(const sequences& of) const {
    return perdita::sequence_layout::padded(static_cast<perdita::index>(of.labels.size()) / length_,
                                            length_);
  }
  std::vector<double> sums(const std::vector<float>& rows) const {
    std::vector<double> result(rows.size() / static_cast<std::size_t>(length_));
    for (std::size_t r = 0; r < rows.size(); ++r)
      result[r / static_cast<std::size_t>(length_)] += static_cast<double>(rows[r]);
    return result;
  }
  /// Asks the head for what it can say of the reference.
  perdita::sequence_call<float> compare_with_reference(const sequences& of) {
    const matrix& hidden = reference_layers_.forward(of.words, of.positions);
    reference_rows_.resize(of.labels.size());
    divergences_.resize(of.labels.size());
    return {.reference = perdita::reference_model<float>(hidden, reference_last_.values()),
            .reverse_kl = divergences_,
            .reference_log_probability = reference_rows_,
            .memory = &memory_};
  }
  scored score(const sequences& of) {
    const matrix& hidden = layers_.forward(of.words, of.positions);
    scored result;
    result.policy.resize(of.labels.size() / static_cast<std::size_t>(length_));
    head_.scores(hidden, last_.values(), of.labels, layout(of), result.policy,
                 compare_with_reference(of));
    result.reference = sums(reference_rows_);
    result.divergence = mean(sums(divergences_)) / length_;
    return result;
  }
  double baseline(const sequences& mismatched) {
    const scored of = score(mismatched);
    return perdita::kto_baseline<double>({.policy = of.policy, .reference = of.reference});
  }

  /// What a small step of the last layer down the gradient of the loss of these pairs would do to
  /// their log-probabilities, in the mean (where each pair counts as its slopes are large).
  perdita::entanglement entangled(const sequences& of, std::span<const double> slopes) {
    const std::size_t n = slopes.size() / 2;
    const matrix& hidden = layers_.forward(of.words, of.positions);
    std::vector<double> scores(2 * n);
    const auto pass = head_.scores(hidden, last_.values(), of.labels, layout(of), scores);
    // The head goes back as often as one likes: to the gradient of the chosen, then of the
    // rejected.
    matrix d_hidden(hidden.rows(), hidden.cols()), gradients[2];
    double slope[2];
    for (const std::size_t side : {0U, 1U}) {
      std::vector<double> weights(2 * n, 0.0);
      const auto part = slopes.subspan(side * n, n);
      slope[side] = std::accumulate(part.begin(), part.end(), 0.0);
      for (std::size_t i = 0; i < n; ++i)
        weights[side * n + i] = part[i] / slope[side];
      gradients[side].resize(last_.values().matrix.rows(), hidden.cols());
      row_vector d_bias(gradients[side].rows());
      pass.backward(weights, d_hidden, perdita::affine(gradients[side], d_bias));
    }
    const auto product = [](const matrix& a, const matrix& b) {
      return a.cast<double>().cwiseProduct(b.cast<double>()).sum();
    };
    return perdita::entangle(slope[0], slope[1], product(gradients[0], gradients[0]),
                             product(gradients[1], gradients[1]),
                             product(gradients[0], gradients[1]))
        .kind;
  }

  network reference_layers_, layers_;
  last_layer reference_last_, last_;
  const method& method_;
  int length_;
  perdita::sequence_head<float> head_{{.shift = false}}; // a row predicts its own label
  perdita::workspace memory_;
  std::vector<float> reference_rows_, divergences_;
};

// ---- The program

options small_language() {
  options result;
  result.epochs = 1;
  result.dimension = 64;
  return result;
}

struct settings {
  std::string figure;
  std::string_view loss = "dpo";
  int steps = 100, pairs = 32, words = 8;
  float rate = 0.05f;
  options language = small_language();
  bool help = false;
};

void usage() {
  const settings s;
  std::printf(
      "usage: preference [OPTION...] [TEXT]\n"
      "\n"
      "Trains word_model's language model on a text, then teaches a copy of it to prefer the "
      "words\n"
      "that follow in the text to the same words shuffled, and prints what becomes of held-out\n"
      "pairs.\n"
      "TEXT: a file, or a directory of which every file is read; by default\n"
      "%s\n"
      "\n"
      "  --loss NAME        dpo, simpo, orpo or kto               (%s)\n"
      "  --steps N          of preference optimisation            (%d)\n"
      "  --pairs N          in a step                             (%d)\n"
      "  --words N          in a continuation                     (%d)\n"
      "  --rate N           of learning, in thousandths           (%.0f)\n"
      "  --epochs N         how often the text is read before     (%d)\n"
      "  --dimension N      numbers per embedding and hidden state (%d)\n"
      "  --seed N           of the random numbers                 (%d)\n"
      "  --figure FILE.svg  draw the log-probabilities over the steps\n"
      "\n"
      "Next step: what one more of the last layer does to chosen and rejected, by their "
      "gradients.\n"
      "Exit status: 0 if the margin between held-out pairs has grown, 1 if not, 2 for an error.\n",
      PERDITA_EXAMPLES_HEADERS, std::string(s.loss).c_str(), s.steps, s.pairs, s.words,
      static_cast<double>(s.rate) * 1000, s.language.epochs, s.language.dimension,
      static_cast<int>(s.language.seed));
}

settings read_settings(int argc, char** argv) {
  settings s;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto value = [&]() -> std::string_view {
      if (i + 1 == argc)
        throw std::runtime_error(std::string(argument) + ": expected a value after it");
      return argv[++i];
    };
    const auto number = [&](int least, int most) {
      return whole_number(argument, value(), least, most);
    };
    if (argument == "--help" || argument == "-h")
      s.help = true;
    else if (argument == "--loss")
      s.loss = value();
    else if (argument == "--steps")
      s.steps = number(1, 1 << 20);
    else if (argument == "--pairs")
      s.pairs = number(2, 1 << 14);
    else if (argument == "--words")
      s.words = number(2, 64);
    else if (argument == "--rate")
      s.rate = static_cast<float>(number(1, 1000)) / 1000;
    else if (argument == "--epochs")
      s.language.epochs = number(1, 1000);
    else if (argument == "--dimension")
      s.language.dimension = number(1, 1 << 14);
    else if (argument == "--seed")
      s.language.seed = whole_number(argument, value(), std::uint64_t{0}, UINT64_MAX);
    else if (argument == "--figure")
      s.figure = value();
    else if (argument.starts_with('-') || !s.language.text.empty())
      throw std::runtime_error("unexpected '" + std::string(argument) +
                               "'; --help lists all options");
    else
      s.language.text = argument;
  }
  return s;
}

const method& find_method(const std::vector<method>& all, std::string_view name) {
  const auto at =
      std::find_if(all.begin(), all.end(), [&](const method& m) { return m.name == name; });
  if (at == all.end())
    throw std::runtime_error("--loss: expected dpo, simpo, orpo or kto, got '" + std::string(name) +
                             "'");
  return *at;
}

const char* name(perdita::entanglement kind) {
  switch (kind) {
  case perdita::entanglement::ideal:
    return "apart";
  case perdita::entanglement::both_fall:
    return "both fall";
  case perdita::entanglement::both_rise:
    return "both rise";
  case perdita::entanglement::reversed:
    break;
  }
  return "reversed";
}

void print(int step, const figures& f) {
  std::printf("%5d %8.4f %8.3f %8.1f %% %10.2f %10.2f %8.3f   %s\n", step, f.loss, f.margin,
              100 * f.accuracy, f.chosen, f.rejected, f.divergence, name(f.kind));
  std::fflush(stdout);
}

/// How the log-probabilities have changed since before the first step.
void draw(const settings& s, const std::vector<figures>& history, int every) {
  chart_line chosen{"chosen", {}}, rejected{"rejected", {}};
  double low = 0, high = 0;
  for (const figures& f : history) {
    chosen.values.push_back(f.chosen - history[0].chosen);
    rejected.values.push_back(f.rejected - history[0].rejected);
    low = std::min({low, chosen.values.back(), rejected.values.back()});
    high = std::max({high, chosen.values.back(), rejected.values.back()});
  }
  double grid = 1;
  while ((high - low) / grid > 12)
    grid *= grid == 2 || grid == 20 ? 2.5 : 2;
  write_chart(s.figure, std::string(s.loss) + ": change of log π of held-out continuations, mean",
              "step", {chosen, rejected}, grid * std::floor(low / grid),
              grid * std::ceil(high / grid), grid, 0, every);
  std::printf("%s\n", s.figure.c_str());
}

int main(int argc, char** argv) try {
  settings s = read_settings(argc, argv);
  if (s.help) {
    usage();
    return 0;
  }
  const std::vector<method> all = methods();
  const method& chosen = find_method(all, s.loss);
  if (s.language.text.empty())
    s.language.text = own_headers();
  Eigen::setNbThreads(1); // the products outside the head are small, and their order stays fixed
  const corpus text = read_corpus(s.language.text);
  std::printf("%s: %zu words, %zu different\n", s.language.text.c_str(), text.words.size(),
              text.vocabulary() - 1);
  model learner(text, s.language, false);
  progress display(s.language.epochs);
  for (int epoch = 1; epoch <= s.language.epochs; ++epoch) {
    const double loss = run_epoch(learner, epoch, s.language.epochs, display).loss;
    display.keep(epoch, "loss " + std::to_string(loss));
  }
  pair_source source(text, s.language.context, s.words, s.language.seed + 1);
  const pairs held_out = source.held_out(128);
  tutor teacher(learner, chosen, s.words);
  std::printf("\nheld-out pairs: %s\n step     loss   margin   accuracy log chosen   rejected"
              "       KL   next step\n",
              std::string(s.loss).c_str());
  const int every = std::max(1, s.steps / 20);
  std::vector<figures> history;
  for (int step = 0; step <= s.steps; ++step) {
    if (step % every == 0) {
      history.push_back(teacher.evaluate(held_out));
      print(step, history.back());
    }
    if (step < s.steps)
      teacher.learn(source.training(s.pairs), s.rate);
  }
  if (!s.figure.empty())
    draw(s, history, every);
  if (history.back().margin > history.front().margin)
    return 0;
  std::fprintf(stderr, "preference: the margin between held-out pairs has not grown\n");
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "preference: %s\n", error.what());
  return 2;
}
