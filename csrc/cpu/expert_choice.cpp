#include "moert/expert_choice.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

struct Problem {
  const void* scores;
  DType dtype;
  int64_t stride;
  const int64_t* segments;
  const int64_t* capacity;
  int64_t T, E, D, k, S, threads;
  int32_t *ids, *offsets, *tokens, *slots;
};

template <typename Real>
Real score_at(const Problem& p, int64_t t, int64_t e) {
  const int64_t i = t * p.stride + e;
  if constexpr (sizeof(Real) == 8) return static_cast<const double*>(p.scores)[i];
  if (p.dtype == DType::f32) return static_cast<const float*>(p.scores)[i];
  if (p.dtype == DType::f16) return to_float(static_cast<const f16*>(p.scores)[i]);
  return to_float(static_cast<const bf16*>(p.scores)[i]);
}

// The score's bits in the order of the scores, then the token's number, the earlier the larger: no two are equal.
template <typename Real>
struct Key {
  using Bits = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;
  using Packed = std::conditional_t<sizeof(Real) == 8, unsigned __int128, uint64_t>;

  static Packed pack(Real score, int64_t t) {
    score += Real(0);  // -0 becomes 0
    Bits bits;
    std::memcpy(&bits, &score, sizeof(bits));
    const Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
    bits = bits & sign ? ~bits : bits | sign;
    return Packed(bits) << 32 | (0xFFFFFFFFu - uint32_t(t));
  }

  static int64_t token(Packed key) { return 0xFFFFFFFFu - uint32_t(key); }
};

// The tokens that take part, segment by segment and in order: those of d are order[begin[d]] .. order[begin[d+1]-1].
struct Segments {
  std::vector<int64_t> begin;
  std::vector<int32_t> order;

  explicit Segments(const Problem& p) : begin(p.D + 1) {
    const auto in = [&](int64_t t) { return uint64_t(p.segments[t]) < uint64_t(p.D); };
    for (int64_t t = 0; t < p.T; ++t)
      if (in(t)) ++begin[p.segments[t] + 1];
    for (int64_t d = 0; d < p.D; ++d) begin[d + 1] += begin[d];
    order.resize(begin[p.D]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t t = 0; t < p.T; ++t)
      if (in(t)) order[next[p.segments[t]]++] = int32_t(t);
  }
};

// taken[e, t] = 1 where expert e takes token t; false where a score is NaN.
template <typename Real>
bool take(const Problem& p, const Segments& segments, std::vector<uint8_t>& taken) {
  using Packed = typename Key<Real>::Packed;
  const int64_t n = int64_t(segments.order.size());
  std::vector<Packed> keys(p.E * n);
  std::atomic<bool> good{true};
  parallel_for(p.D * p.E, n * p.E < 8192 ? 1 : p.threads, [&](int64_t task) {
    const int64_t d = task / p.E, e = task % p.E;
    const int64_t first = segments.begin[d], tokens = segments.begin[d + 1] - first;
    const int64_t count = std::min<int64_t>(p.capacity[task], tokens);
    Packed* key = keys.data() + e * n + first;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t t = segments.order[first + i];
      const Real score = score_at<Real>(p, t, e);
      if (std::isnan(score) && count > 0) good.store(false, std::memory_order_relaxed);
      key[i] = Key<Real>::pack(score, t);
    }
    if (0 < count && count < tokens) std::nth_element(key, key + count - 1, key + tokens, std::greater<>());
    for (int64_t i = 0; i < count; ++i) taken[e * p.T + Key<Real>::token(key[i])] = 1;
  });
  return good;
}

constexpr int64_t kBlock = 256;  // tokens

// What a block of tokens is about to fill: [blocks, E] choices of each expert, then the first slot of each.
struct Counts {
  int64_t E, blocks;
  std::vector<int32_t> of;
  std::vector<int64_t> most;  // [blocks] the largest number of experts that took one token

  Counts(const Problem& p, const std::vector<uint8_t>& taken)
      : E(p.E), blocks((p.T + kBlock - 1) / kBlock), of(blocks * p.E), most(blocks) {
    parallel_for(blocks, p.threads, [&](int64_t block) {
      for (int64_t t = block * kBlock, end = std::min(p.T, t + kBlock); t < end; ++t) {
        int64_t n = 0;
        for (int64_t e = 0; e < E; ++e) {
          n += taken[e * p.T + t];
          of[block * E + e] += taken[e * p.T + t];
        }
        most[block] = std::max(most[block], n);
      }
    });
  }

  // Counts become slots; offsets of the plan.
  void to_slots(int32_t* offsets) {
    int32_t slot = 0;
    for (int64_t e = 0; e < E; ++e) {
      offsets[e] = slot;
      for (int64_t block = 0; block < blocks; ++block) slot += std::exchange(of[block * E + e], slot);
    }
    offsets[E] = slot;
  }
};

// ids, weights, tokens and slots from taken.
template <typename Real>
void fill(const Problem& p, const std::vector<uint8_t>& taken, Counts& next, Real* weights) {
  parallel_for(next.blocks, p.threads, [&](int64_t block) {
    for (int64_t t = block * kBlock, end = std::min(p.T, t + kBlock); t < end; ++t) {
      int64_t i = t * p.k;
      for (int64_t e = 0; e < p.E; ++e) {
        if (!taken[e * p.T + t]) continue;
        const int32_t slot = next.of[block * p.E + e]++;
        p.tokens[slot] = int32_t(t);
        p.slots[i] = slot;
        p.ids[i] = int32_t(e);
        weights[i++] = score_at<Real>(p, t, e);
      }
      for (; i < (t + 1) * p.k; ++i) {
        p.slots[i] = -1;
        p.ids[i] = int32_t(p.E);
        weights[i] = 0;
      }
    }
  });
}

template <typename Real>
void choose(const Problem& p, void* weights) {
  std::vector<uint8_t> taken(p.E * p.T);
  MOERT_CHECK(take<Real>(p, Segments(p), taken), "scores must be numbers, got NaN");
  Counts counts(p, taken);
  int64_t most = 0, total = 0;
  for (int64_t n : counts.most) most = std::max(most, n);
  for (int32_t n : counts.of) total += n;
  MOERT_CHECK(most <= p.k, "max_choices must be at least the ", most, " experts that took a token, got ", p.k);
  MOERT_CHECK(total <= p.S, "max_slots must be at least the ", total, " choices of all experts, got ", p.S);
  counts.to_slots(p.offsets);
  std::fill(p.tokens + total, p.tokens + p.S, -1);
  fill(p, taken, counts, static_cast<Real*>(weights));
}

}  // namespace

void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, int64_t S, int64_t threads, void* weights, int32_t* ids,
                   int32_t* offsets, int32_t* tokens, int32_t* slots) {
  for (int64_t i = 0; i < D * E; ++i) MOERT_CHECK(capacity[i] >= 0, "capacity must be at least 0, got ", capacity[i]);
  const Problem p{scores, dtype, stride, segments, capacity, T, E, D, k, S, threads, ids, offsets, tokens, slots};
  dtype == DType::f64 ? choose<double>(p, weights) : choose<float>(p, weights);
}

}  // namespace moert::cpu
