// A row of logits as a law: its best tokens, what temperature, top-k and top-p leave of it, and draws.

#pragma once

constexpr int64_t kGroup = 64;  // logits under one maximum, so that most need not be looked at

// Index of the first of the greatest of x[0..n), which lie in groups of kGroup with these maxima.
inline int64_t argmax(const float* x, const float* maxima, int64_t n) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  const int64_t g = std::max_element(maxima, maxima + groups) - maxima;
  int64_t i = g * kGroup;
  while (x[i] != maxima[g] && i + 1 < n) ++i;
  return i;
}

inline float group_max(const float* x, int64_t n) {
  Floats highest = all(kNothing);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) highest = max(highest, load(x + i));
  if (i < n) highest = max(highest, load_some(x + i, lanes(0, n - i), kNothing));
  return most(highest);
}

inline std::vector<float> group_maxima(const float* x, int64_t n) {
  std::vector<float> maxima((n + kGroup - 1) / kGroup);
  for (int64_t g = 0; g < int64_t(maxima.size()); ++g)
    maxima[g] = group_max(x + g * kGroup, std::min(kGroup, n - g * kGroup));
  return maxima;
}

using Entry = std::pair<float, int64_t>;  // value, index

inline bool before(const Entry& a, const Entry& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// The K greatest of x[0..n), greatest first. No group whose maximum is below the K-th greatest
// maximum holds one of them.
inline void top(const float* x, const float* maxima, int64_t n, int64_t K, std::vector<Entry>& out) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  float least = kNothing;
  if (K <= groups) {
    std::vector<float> sorted(maxima, maxima + groups);
    std::nth_element(sorted.begin(), sorted.begin() + (K - 1), sorted.end(), std::greater<float>());
    least = sorted[K - 1];
  }
  out.clear();
  for (int64_t g = 0; g < groups; ++g) {
    if (!(maxima[g] >= least)) continue;
    const int64_t end = std::min(n, (g + 1) * kGroup);
    for (int64_t i = g * kGroup; i < end; ++i)
      if (x[i] >= least) out.emplace_back(x[i], i);
  }
  if (out.empty()) out.emplace_back(x[0], 0);  // nothing but NaN
  const int64_t kept = std::min<int64_t>(K, int64_t(out.size()));
  std::partial_sort(out.begin(), out.begin() + kept, out.end(), before);
  out.resize(kept);
}

// The noise of dspark.decoding.noise: SplitMix64, and the centre of the cell that a word names.
inline uint64_t mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
  return word ^ (word >> 31);
}

inline double unit(uint64_t word) { return (double(word >> 12) + 0.5) * 0x1p-52; }

inline uint64_t word(uint64_t key, int64_t token) {
  return mix(key + uint64_t(token + 1) * 0x9E3779B97F4A7C15ull);
}

inline double gumbel(uint64_t key, int64_t token) {
  return -std::log(-std::log(unit(word(key, token))));
}

// One row of logits as a law after temperature, top-k and top-p (dspark.decoding.law): token i is
// kept if x[i] > least, or x[i] = least and i <= tie, and then weighs
// exp((x[i] - top_logit) / T) / weight_sum.
struct Law {
  const float* x;
  int64_t size;
  float scale, top_logit;  // 1 / T, the greatest logit
  float least = kNothing;
  int64_t tie;
  double weight_sum;
  std::vector<float> maxima;  // of groups of kGroup

  bool keeps(int64_t i) const { return x[i] > least || (x[i] == least && i <= tie); }
  double weight(int64_t i) const {
    return keeps(i) ? std::exp((double(x[i]) - top_logit) * scale) / weight_sum : 0.0;
  }
  // Lanes i .. i + 15 that are kept, and their exponentials.
  Floats exponentials(int64_t i) const {
    const Mask inside = lanes(0, size - i);
    const Floats v = size - i >= 16 ? load(x + i) : load_some(x + i, inside, kNothing);
    Mask kept = both(no_less(v, all(least)), inside);
    if (tie < size)  // of what is as great as the least, only what comes early
      kept = without(kept, without(equal(v, all(least)), lanes(0, tie - i + 1)));
    return choose(kept, exp((v - all(top_logit)) * all(scale)), zero());
  }
  double group_sum(int64_t g) const {
    Floats total = zero();
    const int64_t end = std::min(size, (g + 1) * kGroup);
    for (int64_t i = g * kGroup; i < end; i += 16) total = total + exponentials(i);
    return sum(total);
  }

  Law(const float* logits, int64_t count, float temperature, int64_t top_k, float top_p)
      : x(logits), size(count), scale(1.0f / temperature), tie(count),
        maxima(group_maxima(logits, count)) {
    const int64_t groups = int64_t(maxima.size());
    top_logit = *std::max_element(maxima.begin(), maxima.end());
    if (top_k > 0 && top_k < size) {
      std::vector<float> sorted;
      if (top_k <= groups) {
        std::vector<Entry> best;
        top(x, maxima.data(), size, top_k, best);
        least = best.back().first;
      } else {
        sorted.assign(x, x + size);
        std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(),
                         std::greater<float>());
        least = sorted[top_k - 1];
      }
    }
    weight_sum = 0.0;
    for (int64_t g = 0; g < groups; ++g)
      if (maxima[g] >= least) weight_sum += group_sum(g);
    if (top_p < 1.0f) cut_top_p(top_p);
  }

  // Keeps the smallest set of likeliest tokens whose weight reaches top_p of the weight_sum; of equal ones,
  // the first. Nearly always it lies within a few hundred tokens; if not, its edge is bisected.
  void cut_top_p(float top_p) {
    const double enough = double(top_p) * weight_sum;
    std::vector<Entry> best;
    top(x, maxima.data(), size, std::min<int64_t>(256, int64_t(maxima.size())), best);
    double mass = 0.0;
    for (const Entry& entry : best) {
      if (entry.first < least) return;
      mass += std::exp((double(entry.first) - top_logit) * scale);
      if (mass >= enough) {
        least = entry.first, tie = entry.second, weight_sum = mass;
        return;
      }
    }
    std::vector<float> weights((size + 15) / 16 * 16), values(weights.size(), kNothing);
    std::copy(x, x + size, values.begin());
    for (int64_t i = 0; i < size; i += 16) store(weights.data() + i, exponentials(i));
    const auto from = [&](float edge) {  // weight of what is no less than the edge
      double total = 0.0;
      for (size_t i = 0; i < values.size(); i += 1024) {
        Floats some = zero();
        for (size_t k = i; k < std::min(i + 1024, values.size()); k += 16) {
          const Mask in = no_less(load(values.data() + k), all(edge));
          some = some + choose(in, load(weights.data() + k), zero());
        }
        total += sum(some);
      }
      return total;
    };
    // Floats in order as integers: from(low) is enough, from(high) is not.
    int32_t high = ordered(best.back().first) + 1;
    int32_t low = ordered(std::max(least, top_logit - 100.0f / scale));
    while (int64_t(high) - low > 1) {
      const int32_t middle = int32_t((int64_t(high) + low) / 2);
      (from(unordered(middle)) >= enough ? low : high) = middle;
    }
    const float edge = unordered(low);
    mass = from(unordered(high));
    for (int64_t i = 0; i < size; ++i) {
      if (x[i] != edge) continue;
      tie = i;
      mass += weights[i];
      if (mass >= enough) break;
    }
    least = edge, weight_sum = mass;
  }
  static int32_t ordered(float value) {
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits >= 0 ? bits : int32_t(0x80000000u - uint32_t(bits));
  }
  static float unordered(int32_t bits) {
    if (bits < 0) bits = int32_t(0x80000000u - uint32_t(bits));
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }

  // The token at which the running weight_sum of max(p - q, 0) passes `draw` of its total, in the order of
  // token ids. `taken` holds (token, min(p, q)) by token; empty for p itself.
  int64_t invert(double draw, const std::vector<std::pair<int64_t, double>>& taken) const {
    double total = 1.0;
    for (const auto& [token, share] : taken) total -= share;
    // p = q up to rounding leaves nothing: then p itself is the residual's limit
    static const std::vector<std::pair<int64_t, double>> nothing;
    const auto& minus = total > 1e-9 ? taken : nothing;
    const double until = draw * (total > 1e-9 ? total : 1.0);
    double so_far = 0.0;
    int64_t last = -1;
    auto next = minus.begin();
    for (int64_t g = 0; g < int64_t(maxima.size()); ++g) {
      const int64_t end = std::min(size, (g + 1) * kGroup);
      auto after = next;
      double share = 0.0;
      while (after != minus.end() && after->first < end) share += (after++)->second;
      const double here = maxima[g] >= least ? group_sum(g) / weight_sum - share : 0.0;
      if (here > 0.0 && so_far + here > until) {
        for (int64_t i = g * kGroup; i < end; ++i) {
          double p = weight(i);
          while (next != after && next->first < i) ++next;
          if (next != after && next->first == i) p -= next->second;
          if (p <= 0.0) continue;
          last = i;
          so_far += p;
          if (so_far > until) return i;
        }
        if (last >= 0) return last;
      }
      so_far += std::max(here, 0.0);
      next = after;
    }
    if (last >= 0) return last;
    return argmax(x, maxima.data(), size);  // rounding left the draw past the end
  }

  // argmax of log p + gumbel noise. The likeliest tokens set a score that the noise of nearly all
  // others cannot reach, which their random bits tell without a logarithm.
  int64_t perturbed(uint64_t key) const {
    std::vector<Entry> best;
    top(x, maxima.data(), size, std::min<int64_t>(32, size), best);
    double highest = -std::numeric_limits<double>::infinity();
    int64_t winner = best[0].second;
    auto look = [&](int64_t i) {
      if (!keeps(i)) return;
      const double score = (double(x[i]) - top_logit) * scale + gumbel(key, i);
      if (score > highest || (score == highest && i < winner)) highest = score, winner = i;
    };
    for (const Entry& entry : best) look(entry.second);
    for (int64_t g = 0; g < int64_t(maxima.size()); ++g) {
      if (maxima[g] < least) continue;
      const double need = highest - (double(maxima[g]) - top_logit) * scale;
      const double bound = std::exp(-std::exp(-need)) * 0x1p52;  // of the 52 bits
      if (bound >= 0x1p52) continue;
      const uint64_t floor = uint64_t(std::max(0.0, bound - 4096.0)) << 12;
      const int64_t first = g * kGroup;
      uint64_t words[kGroup];
      for (int64_t i = 0; i < kGroup; ++i) words[i] = word(key, first + i);
      for (int64_t i = 0; i < std::min(kGroup, size - first); ++i)
        if (words[i] >= floor) look(first + i);
    }
    return winner;
  }
};

