#include "moert/expert_choice.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
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
  int64_t T, E, D, k, threads;
  int32_t* ids;
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

// ids and weights from taken; the largest number of experts that took one token.
template <typename Real>
int64_t fill(const Problem& p, const std::vector<uint8_t>& taken, Real* weights) {
  constexpr int64_t step = 256;
  const int64_t blocks = (p.T + step - 1) / step;
  std::vector<int64_t> most(blocks);
  parallel_for(blocks, p.threads, [&](int64_t block) {
    for (int64_t t = block * step, end = std::min(p.T, t + step); t < end; ++t) {
      int64_t j = 0;
      for (int64_t e = 0; e < p.E; ++e) {
        if (!taken[e * p.T + t]) continue;
        if (j < p.k) {
          p.ids[t * p.k + j] = int32_t(e);
          weights[t * p.k + j] = score_at<Real>(p, t, e);
        }
        ++j;
      }
      most[block] = std::max(most[block], j);
      for (; j < p.k; ++j) {
        p.ids[t * p.k + j] = int32_t(p.E);
        weights[t * p.k + j] = 0;
      }
    }
  });
  return *std::max_element(most.begin(), most.end());
}

template <typename Real>
void choose(const Problem& p, void* weights) {
  std::vector<uint8_t> taken(p.E * p.T);
  MOERT_CHECK(take<Real>(p, Segments(p), taken), "scores must be numbers, got NaN");
  const int64_t most = fill(p, taken, static_cast<Real*>(weights));
  MOERT_CHECK(most <= p.k, "max_choices must be at least the ", most, " experts that took a token, got ", p.k);
}

}  // namespace

void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, int64_t threads, void* weights, int32_t* ids) {
  for (int64_t i = 0; i < D * E; ++i) MOERT_CHECK(capacity[i] >= 0, "capacity must be at least 0, got ", capacity[i]);
  if (T == 0) return;
  const Problem p{scores, dtype, stride, segments, capacity, T, E, D, k, threads, ids};
  dtype == DType::f64 ? choose<double>(p, weights) : choose<float>(p, weights);
}

}  // namespace moert::cpu
