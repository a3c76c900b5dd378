// SPDX-License-Identifier: MIT
#pragma once

/// The text of examples/word_model.cpp: reading it, splitting it into words, and what counting
/// alone makes of it.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

/// The text of a file, or of all files of a directory, one after the other, by name.
inline std::string read_text(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path))
      if (entry.is_regular_file())
        files.push_back(entry.path());
    std::sort(files.begin(), files.end());
  } else {
    files.push_back(path);
  }
  std::string text;
  for (const auto& name : files) {
    std::ifstream file(name, std::ios::binary);
    if (!file)
      throw std::runtime_error(name.string() + ": " + std::strerror(errno));
    text.append(std::istreambuf_iterator<char>(file), {});
  }
  return text;
}

/// Typographic quotes and dashes as ASCII ones, capitals as small letters ("The" is "the"). Letters
/// outside ASCII stay as they are.
inline std::string plain(std::string_view text) {
  static constexpr std::pair<std::string_view, std::string_view> marks[] = {
      {"‘", "'"}, {"’", "'"}, {"“", "\""}, {"”", "\""}, {"–", "--"}, {"—", "--"}, {"…", "..."}};
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const auto mark = std::find_if(std::begin(marks), std::end(marks), [&](const auto& m) {
      return text.substr(at).starts_with(m.first);
    });
    if (mark != std::end(marks)) {
      result += mark->second;
      at += mark->first.size();
    } else {
      const char c = text[at++];
      result += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    }
  }
  return result;
}

/// Calls found(word) for every word of a plain text. A word is
///   letters and digits, with single ' or _ between two of them: don't, 1851, label_smoothing;
///   or the same mark once or several times: , :: -- (so "rows_);" is the four words rows _ ) ;).
template <class Found> void for_each_word(std::string_view text, Found found) {
  const auto blank = [](char c) { return c >= 0 && c <= ' '; };
  const auto letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || static_cast<unsigned char>(c) >= 128;
  };
  for (std::size_t first = 0, end; first < text.size(); first = end) {
    end = first + 1;
    if (letter(text[first])) {
      const auto at = [&](std::size_t i) { return i < text.size() ? text[i] : ' '; };
      while (letter(at(end)) || ((at(end) == '\'' || at(end) == '_') && letter(at(end + 1))))
        ++end;
    } else {
      while (end < text.size() && text[end] == text[first])
        ++end;
    }
    if (!blank(text[first]))
      found(text.substr(first, end - first));
  }
}

using word_number = std::uint32_t;
using position = std::uint32_t; // in a text

/// A text as numbers of words. Its last tenth is held out: nothing is learnt from it, and what
/// occurs only there is `unknown`.
struct corpus {
  static constexpr word_number unknown = 0;
  std::vector<word_number> words; ///< the whole text
  std::vector<int> counts;  ///< how often each word of the vocabulary occurs in the training part
  std::size_t training = 0; ///< size of the training part

  std::size_t vocabulary() const { return counts.size(); }
  std::size_t held_out() const { return words.size() - training; }
};

inline corpus read_corpus(const std::string& path) {
  const std::string text = plain(read_text(path));
  constexpr std::size_t least = 1000, most = std::numeric_limits<int>::max();
  std::size_t size = 0;
  for_each_word(text, [&](std::string_view) { ++size; });
  if (size < least || size > most)
    throw std::runtime_error(path + ": expected " + std::to_string(least) + " to " +
                             std::to_string(most) + " words, found " + std::to_string(size));
  corpus result;
  result.training = size - size / 10;
  result.counts = {0};
  std::unordered_map<std::string_view, word_number> numbers;
  for_each_word(text, [&](std::string_view word) {
    const bool learning = result.words.size() < result.training;
    const auto known = numbers.find(word);
    word_number number = corpus::unknown;
    if (known != numbers.end())
      number = known->second;
    else if (learning) {
      number = static_cast<word_number>(result.vocabulary());
      numbers.emplace(word, number);
      result.counts.push_back(0);
    }
    if (learning)
      ++result.counts[number];
    result.words.push_back(number);
  });
  return result;
}

inline double unknown_share(const corpus& text) {
  const auto held_out = std::span(text.words).subspan(text.training);
  return static_cast<double>(std::count(held_out.begin(), held_out.end(), corpus::unknown)) /
         static_cast<double>(held_out.size());
}

/// The probability of every word by its count alone. About as many words are new to a text as occur
/// in it once (Good and Turing): half a count of each such word is taken for `unknown`.
inline std::vector<double> unigram_model(const corpus& text) {
  std::vector<double> probability(text.counts.begin(), text.counts.end());
  double& unknown = probability[corpus::unknown];
  unknown = 0.5; // and never nothing
  for (double& p : probability)
    if (p == 1) {
      p -= 0.5;
      unknown += 0.5;
    }
  for (double& p : probability)
    p /= static_cast<double>(text.training) + 0.5;
  return probability;
}

/// exp of the mean of -log probability(word before, word) over the held-out words.
template <class Probability> double perplexity(const corpus& text, Probability probability) {
  double sum = 0;
  for (std::size_t i = text.training; i < text.words.size(); ++i)
    sum -= std::log(probability(text.words[i - 1], text.words[i]));
  return std::exp(sum / static_cast<double>(text.held_out()));
}

inline double unigram_perplexity(const corpus& text) {
  const std::vector<double> p = unigram_model(text);
  return perplexity(text, [&](word_number, word_number word) { return p[word]; });
}

/// Counts of pairs, each less 0.75; what that frees goes to the unigram model (Ney et al. 1994).
inline double bigram_perplexity(const corpus& text) {
  constexpr double discount = 0.75;
  const std::vector<double> unigram = unigram_model(text);
  std::map<std::pair<word_number, word_number>, int> pairs;
  for (std::size_t i = 1; i < text.training; ++i)
    ++pairs[{text.words[i - 1], text.words[i]}];
  std::vector<double> before(unigram.size()), kinds(unigram.size());
  for (const auto& [pair, count] : pairs) {
    before[pair.first] += count;
    kinds[pair.first] += 1;
  }
  return perplexity(text, [&](word_number previous, word_number word) {
    const double p = unigram[word];
    if (before[previous] == 0)
      return p;
    const auto pair = pairs.find({previous, word});
    const double kept = pair == pairs.end() ? 0 : pair->second - discount;
    return (kept + discount * kinds[previous] * p) / before[previous];
  });
}
