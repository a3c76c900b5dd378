// SPDX-License-Identifier: MIT
//
// Learns embeddings in which the two halves of a paragraph find each other: hashed n-grams of
// letters, a linear map, and CLIP's symmetric loss on the similarity head, which holds no matrix of
// all halves with all others.
//
// A batch is encoded piece by piece, twice, as by GradCache (Gao et al. 2021): first for the
// embeddings of all, which the loss makes gradients of; then each piece is encoded anew and takes
// its part of these back. Only embeddings are held for the whole batch, so that it may be larger
// than what an encoder's memory allows. See learn(), below.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <Eigen/Core>

#include <perdita/cross_entropy.hpp>
#include <perdita/similarity.hpp>

#include "generator.hpp"
#include "line_chart.hpp"
#include "whole_number.hpp"

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct settings {
  std::string text, figure;
  int epochs = 12, batch = 512, chunk = 64, dimension = 96;
  float rate = 0.15f;
};

constexpr int buckets = 1 << 16;

struct term {
  int bucket;
  float weight;
};
using document = std::vector<term>;

/// Counts of words and of their pieces of three and four letters, in hashed buckets.
std::map<int, float> count_pieces(const std::vector<std::string>& words) {
  std::map<int, float> counts;
  const auto add = [&](std::string_view piece) {
    std::uint32_t hash = 2166136261u; // FNV-1a
    for (const char c : piece)
      hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
    counts[static_cast<int>((hash ^ (hash >> 16)) % buckets)] += 1;
  };
  for (const std::string& word : words) {
    add(word);
    const std::string marked = "<" + word + ">";
    for (const std::size_t n : {3U, 4U})
      for (std::size_t i = 0; i + n <= marked.size(); ++i)
        add(std::string_view(marked).substr(i, n));
  }
  return counts;
}

/// Words of each paragraph that is long enough to be cut in two.
std::vector<std::vector<std::string>> read_paragraphs(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    throw std::runtime_error(path + ": cannot be read");
  constexpr std::size_t least = 24;
  std::vector<std::vector<std::string>> result(1);
  for (std::string line; std::getline(file, line);) {
    for (char& c : line)
      c = std::isalpha(static_cast<unsigned char>(c))
              ? static_cast<char>(std::tolower(static_cast<unsigned char>(c)))
              : ' ';
    std::istringstream words(line);
    bool empty = true;
    for (std::string word; words >> word; empty = false)
      result.back().push_back(word);
    if (empty && !result.back().empty()) {
      if (result.back().size() < least)
        result.back().clear();
      else
        result.emplace_back();
    }
  }
  if (result.back().size() < least)
    result.pop_back();
  return result;
}

/// First and second halves of paragraphs; terms weigh (1 + log count) × log(documents ÷ those with
/// the bucket), to length 1.
struct pairs {
  std::vector<document> first, second;

  explicit pairs(const std::string& path, generator& random) {
    std::vector<std::vector<std::string>> paragraphs = read_paragraphs(path);
    for (std::size_t i = paragraphs.size(); i > 1; --i)
      std::swap(paragraphs[i - 1],
                paragraphs[static_cast<std::size_t>(random.below(static_cast<int>(i)))]);
    std::vector<std::map<int, float>> counts;
    std::vector<int> documents(buckets, 0);
    for (const auto& words : paragraphs) {
      const auto middle = words.begin() + static_cast<std::ptrdiff_t>(words.size() / 2);
      counts.push_back(count_pieces({words.begin(), middle}));
      counts.push_back(count_pieces({middle, words.end()}));
    }
    for (const auto& c : counts)
      for (const auto& [bucket, count] : c)
        ++documents[static_cast<std::size_t>(bucket)];
    for (std::size_t i = 0; i < counts.size(); ++i) {
      document d;
      float square = 0;
      for (const auto& [bucket, count] : counts[i]) {
        const float rare =
            std::log(static_cast<float>(counts.size()) /
                     static_cast<float>(documents[static_cast<std::size_t>(bucket)]));
        d.push_back({bucket, (1 + std::log(count)) * rare});
        square += d.back().weight * d.back().weight;
      }
      for (term& t : d)
        t.weight /= square > 0 ? std::sqrt(square) : 1;
      (i % 2 == 0 ? first : second).push_back(std::move(d));
    }
  }
  int size() const { return static_cast<int>(first.size()); }
};

/// Σ weight × row of the bucket; learns by Adagrad with one rate for each row.
class encoder {
public:
  encoder(int dimension, generator& random)
      : table_(buckets, dimension), squares_(Eigen::VectorXf::Constant(buckets, 1e-8f)) {
    for (Eigen::Index i = 0; i < table_.size(); ++i)
      table_.data()[i] = random.symmetric() / std::sqrt(static_cast<float>(dimension));
  }
  Eigen::Index dimension() const { return table_.cols(); }

  template <class Out> void encode(const document* documents, int n, Out&& out) const {
    out.setZero();
    for (int i = 0; i < n; ++i)
      for (const term& t : documents[i])
        out.row(i) += t.weight * table_.row(t.bucket);
  }
  template <class Slopes>
  void add_gradient(const document* documents, int n, const Slopes& slopes) {
    for (int i = 0; i < n; ++i)
      for (const term& t : documents[i]) {
        auto [at, fresh] = gradient_.try_emplace(t.bucket);
        if (fresh)
          at->second = Eigen::RowVectorXf::Zero(dimension());
        at->second += t.weight * slopes.row(i);
      }
  }
  void step(float rate) {
    for (const auto& [bucket, g] : gradient_) {
      float& square = squares_[bucket];
      square += g.squaredNorm() / static_cast<float>(dimension());
      table_.row(bucket) -= rate / std::sqrt(square) * g;
    }
    gradient_.clear();
  }

private:
  matrix table_;
  Eigen::VectorXf squares_;
  std::map<int, Eigen::RowVectorXf> gradient_;
};

/// exp(log_scale): learnable, and kept from growing beyond 100, as CLIP's is.
class model {
public:
  model(const settings& s, generator& random) : s_(s), encoder_(s.dimension, random) {}

  /// One step on the pairs from `begin` on; the loss.
  float learn(const pairs& p, int begin, int n, float rate) {
    matrix x(n, s_.dimension), y(n, s_.dimension), d_x(n, s_.dimension), d_y(n, s_.dimension);
    for_chunks(n, [&](int at, int count) { // embeddings of the whole batch
      encoder_.encode(&p.first[static_cast<std::size_t>(begin + at)], count,
                      x.middleRows(at, count));
      encoder_.encode(&p.second[static_cast<std::size_t>(begin + at)], count,
                      y.middleRows(at, count));
    });
    double d_scale = 0;
    const perdita::similarity clip(
        perdita::cross_entropy<float>{},
        {.scale = std::exp(log_scale_), .both = true, .d_scale = &d_scale});
    const float value = clip(x, y, d_x, d_y, {.memory = &memory_});
    for_chunks(n, [&](int at, int count) { // each piece takes its part back
      encoder_.add_gradient(&p.first[static_cast<std::size_t>(begin + at)], count,
                            d_x.middleRows(at, count));
      encoder_.add_gradient(&p.second[static_cast<std::size_t>(begin + at)], count,
                            d_y.middleRows(at, count));
    });
    encoder_.step(rate);
    log_scale_ =
        std::clamp(log_scale_ - 0.1 * rate * d_scale * std::exp(log_scale_), 0.0, std::log(100.0));
    return value;
  }

  struct recall {
    double at_1, at_10;
  };
  /// How often the other half is the nearest, or among the ten nearest, of n second halves, and
  /// the other way round.
  recall find(const pairs& p, int begin, int n) const {
    matrix x(n, s_.dimension), y(n, s_.dimension);
    encoder_.encode(&p.first[static_cast<std::size_t>(begin)], n, x);
    encoder_.encode(&p.second[static_cast<std::size_t>(begin)], n, y);
    x.rowwise().normalize();
    y.rowwise().normalize();
    const matrix cosines = x * y.transpose();
    double first = 0, ten = 0;
    for (int i = 0; i < n; ++i) {
      const auto nearer = (cosines.row(i).array() > cosines(i, i)).count(),
                 other = (cosines.col(i).array() > cosines(i, i)).count();
      first += (nearer < 1) + (other < 1);
      ten += (nearer < 10) + (other < 10);
    }
    return {50 * first / n, 50 * ten / n};
  }
  double scale() const { return std::exp(log_scale_); }

private:
  template <class F> void for_chunks(int n, F f) const {
    for (int at = 0; at < n; at += s_.chunk)
      f(at, std::min(s_.chunk, n - at));
  }

  settings s_;
  encoder encoder_;
  double log_scale_ = std::log(10.0);
  perdita::workspace memory_;
};

int main(int argc, char** argv) try {
  settings s;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    const bool last = i + 1 == argc;
    if (option == "--figure" && !last)
      s.figure = argv[++i];
    else if (option == "--epochs" && !last)
      s.epochs = whole_number("--epochs", argv[++i], 1, 10000);
    else if (option == "--batch" && !last)
      s.batch = whole_number("--batch", argv[++i], 2, 1 << 20);
    else if (option == "--chunk" && !last)
      s.chunk = whole_number("--chunk", argv[++i], 1, 1 << 20);
    else if (!option.starts_with('-') && s.text.empty())
      s.text = argv[i];
    else
      s.text.clear(), i = argc;
  }
  if (s.text.empty()) {
    std::fprintf(stderr,
                 "usage: paired_text [--epochs N] [--batch N] [--chunk N] [--figure FILE.svg] "
                 "FILE.txt\n\nLearns to find the second half of a paragraph of FILE by its first, "
                 "and prints how often\nthat succeeds with paragraphs it has not learned from.\n");
    return 2;
  }
  generator random(1);
  pairs p(s.text, random);
  const int held_out = p.size() / 5, train = p.size() - held_out;
  if (held_out < 20)
    throw std::runtime_error(s.text + ": has " + std::to_string(p.size()) +
                             " paragraphs of 24 words or more, expected 100 at the least");
  s.batch = std::min(s.batch, train);
  std::printf("%d paragraphs to learn from, %d held out\n\nepoch    loss   scale   recall@1   "
              "recall@10\n",
              train, held_out);
  model m(s, random);
  chart_line one{"recall@1", {}}, ten{"recall@10", {}};
  const auto report = [&](int epoch, double loss) {
    const auto found = m.find(p, train, held_out);
    char text[16] = "-";
    if (epoch > 0)
      std::snprintf(text, sizeof text, "%.3f", loss);
    std::printf("%5d %7s %7.1f %8.1f %% %9.1f %%\n", epoch, text, m.scale(), found.at_1,
                found.at_10);
    std::fflush(stdout);
    one.values.push_back(found.at_1);
    ten.values.push_back(found.at_10);
  };
  report(0, 0);
  for (int epoch = 1; epoch <= s.epochs; ++epoch) {
    double loss = 0;
    int steps = 0;
    for (int begin = 0; begin + s.batch <= train; begin += s.batch, ++steps)
      loss += static_cast<double>(m.learn(p, begin, s.batch, s.rate));
    report(epoch, loss / steps);
  }
  if (!s.figure.empty()) {
    write_chart(s.figure, "Halves of paragraphs that find each other, %, of those held out",
                "before, and after each epoch", {one, ten}, 0, 40, 5);
    std::printf("%s\n", s.figure.c_str());
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "paired_text: %s\n", error.what());
  return 2;
}
