// Gating with a warp for each token: its logits stay in registers, Items to a lane.  Compiled without fused
// multiply-add and with the CPU's exponential, so that scores of single logits are the CPU's to the bit, and ids too.
#pragma once

#include "cuda/simt.h"
#include "moert/gating.h"

namespace moert::cuda {

struct GatingCall {
  const void* logits;
  DType dtype;
  int64_t stride;
  const void* bias;
  int64_t T;
  int E, k;
  GatingOptions options;
  bool aligned;   // every row begins at a multiple of 16 bytes
  void* weights;  // read by the backward: dweights
  int32_t* ids;   // read by the backward
  void* dlogits;  // written by the backward
};

constexpr int kGatingThreads = 128;  // four tokens a block

// Experts a lane has side by side: one or two 16-byte loads, where the row is long enough.
template <int Items>
constexpr int kSide = Items < 8 ? Items : 8;

// The expert of a lane's item.
template <int Items>
MOERT_HOST_DEVICE constexpr int expert_of_item(int lane, int item) {
  return (item / kSide<Items> * kWarp + lane) * kSide<Items> + item % kSide<Items>;
}

template <int Items>
MOERT_HOST_DEVICE constexpr int lane_of_expert(int e) {
  return e / kSide<Items> % kWarp;
}

template <int Items>
MOERT_HOST_DEVICE constexpr int item_of_expert(int e) {
  return e / (kSide<Items> * kWarp) * kSide<Items> + e % kSide<Items>;
}

// e^x for x < 88 as cpu/gating_kernel.h has it.
MOERT_DEVICE_INLINE float exp_to_88(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = r * 1.3814304256811738e-3f + 8.36885254830122e-3f;
  p = p * r + 4.1668400168418884e-2f;
  p = p * r + 1.666651964187622e-1f;
  p = p * r + 4.999999403953552e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  return x < -87.33f ? 0.0f : y * bits_to_float((float_to_bits(shifted) + 127u) << 23);
}

// Not inlined: float64 is for checking gradients, and this is long.
__device__ __noinline__ inline double exp_to_88(double x) { return exp(x); }

template <typename Real>
MOERT_DEVICE_INLINE Real gate_sigmoid(Real x) {
  constexpr Real kLowest = sizeof(Real) == 8 ? -708 : -87.33;  // below, it is no normal number
  return x < kLowest ? Real(0) : 1 / (1 + exp_to_88(-x));
}

// Selection scores as integers in the same order: no choice at all, then NaN, then -inf to inf.
template <typename Real>
struct Keys {
  using Int = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  static constexpr Int kMax = Int(~uint64_t(0) >> (65 - 8 * sizeof(Int)));
  static constexpr Int kNone = -kMax - 1;
  static constexpr Int kNan = kNone + 1;

  static MOERT_DEVICE_INLINE Int order(Real x) {
    if (x != x) return kNan;
    Int bits;
    if constexpr (sizeof(Real) == 8)
      bits = Int(double_to_bits(x + 0.0));  // -0 becomes 0
    else
      bits = Int(float_to_bits(x + 0.0f));
    return bits ^ (bits >> (8 * sizeof(Int) - 1) & kMax);
  }
};

// What a warp knows of its token.
template <typename Real, int Items>
struct GatingRow {
  using Key = typename Keys<Real>::Int;
  static constexpr Key kNone = Keys<Real>::kNone;

  const GatingCall& call;
  int64_t token;
  int lane;
  Real x[Items];  // logits, then scores; those beyond E are never looked at

  MOERT_DEVICE_INLINE GatingRow(const GatingCall& call, int64_t token) : call(call), token(token), lane(lane_id()) {}

  MOERT_DEVICE_INLINE int expert(int i) const { return expert_of_item<Items>(lane, i); }

  // In: the type of the logits.
  template <typename In>
  MOERT_DEVICE_INLINE void load() {
    const In* row = static_cast<const In*>(call.logits) + token * call.stride;
    constexpr int side = kSide<Items>, wide = kChunk<In>;
#pragma unroll
    for (int i = 0; i < Items; i += side) {
      const int e = expert(i);
      if (side % wide == 0 && call.aligned && e + side <= call.E) {
#pragma unroll
        for (int c = 0; c < side; c += wide) {
          const Chunk chunk = load_chunk(row + e + c);
#pragma unroll
          for (int n = 0; n < wide; ++n)
            if (c + n < side) x[i + c + n] = element<In>(chunk, n);
        }
      } else {
#pragma unroll
        for (int n = 0; n < side; ++n) x[i + n] = e + n < call.E ? Real(widen(row[e + n])) : Real(0);
      }
    }
  }

  MOERT_DEVICE_INLINE void load_any() {
    if constexpr (sizeof(Real) == 8)
      load<double>();
    else if (call.dtype == DType::f32)
      load<float>();
    else if (call.dtype == DType::bf16)
      load<bf16>();
    else
      load<f16>();
  }

  // x of any expert, in every lane.
  MOERT_DEVICE_INLINE Real value(int e) const {
    const int item = item_of_expert<Items>(e);
    Real mine = x[0];
#pragma unroll
    for (int i = 1; i < Items; ++i) mine = i == item ? x[i] : mine;
    return __shfl_sync(kAllLanes, mine, lane_of_expert<Items>(e));
  }

  // x = scores, but those of the chosen only where they alone decide (softmax_over_topk).
  MOERT_DEVICE_INLINE void score_all() {
    const Score score = call.options.score;
    if (score == Score::softmax) {
      Real max = -Real(INFINITY), sum = 0;
#pragma unroll
      for (int i = 0; i < Items; ++i) max = expert(i) < call.E && x[i] > max ? x[i] : max;
      max = warp_max(max);
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        if (expert(i) >= call.E) continue;
        x[i] = exp_to_88(x[i] - max);
        sum += x[i];
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < Items; ++i) x[i] /= sum;
    }
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if (score == Score::sigmoid) x[i] = gate_sigmoid(x[i]);
      if (score == Score::relu) x[i] = x[i] < 0 ? Real(0) : x[i];
    }
  }

  MOERT_DEVICE_INLINE Real selection(int i) const {
    return call.bias && expert(i) < call.E ? x[i] + static_cast<const Real*>(call.bias)[expert(i)] : x[i];
  }

  // The best and the second best selection score of group g, in every lane.  A NaN is above nothing.
  MOERT_DEVICE_INLINE void best_of_group(int g, int size, Real& first, Real& second) const {
    first = second = -Real(INFINITY);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if (expert(i) / size != g || expert(i) >= call.E) continue;
      const Real s = selection(i), loser = s > first ? first : s;
      first = s > first ? s : first;
      second = loser > second ? loser : second;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Real f = __shfl_xor_sync(kAllLanes, first, step), s = __shfl_xor_sync(kAllLanes, second, step);
      const Real loser = f > first ? first : f;
      first = f > first ? f : first;
      second = loser > second ? loser : second;
      second = s > second ? s : second;
    }
  }

  // key[i] = kNone where the group of item i is not among the best.  Lane g has the key of group g.
  MOERT_DEVICE_INLINE void limit_groups(Key (&key)[Items]) const {
    const GatingOptions& options = call.options;
    const int G = int(options.num_groups), size = call.E / G;
    typename GatingRow<Real, 1>::Key group[1] = {kNone};
#pragma unroll 1
    for (int g = 0; g < G; ++g) {
      Real first, second;
      best_of_group(g, size, first, second);
      if (g == lane) group[0] = Keys<Real>::order(options.group_score == GroupScore::top2 ? first + second : first);
    }
    uint32_t allowed = 0;  // a bit for each item of this lane
#pragma unroll 1
    for (int n = 0; n < int(options.topk_groups); ++n) {
      const int best = GatingRow<Real, 1>::take_best(group, [&](int) { return lane; });
#pragma unroll
      for (int i = 0; i < Items; ++i)
        if (expert(i) / size == best) allowed |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < Items; ++i)
      if (!(allowed >> i & 1)) key[i] = kNone;
  }

  // The name of the largest key of the warp, of equals the lowest; its key becomes kNone.
  template <typename Name>
  static MOERT_DEVICE_INLINE int take_best(Key (&key)[Items], const Name& name) {
    Key best = key[0];
    int mine = 0;
#pragma unroll
    for (int i = 1; i < Items; ++i)
      if (key[i] > best) best = key[i], mine = i;  // names ascend with i
    const Key highest = warp_max(best);
    const int candidate = best == highest ? -name(mine) : -0x7fffffff;
    const int lowest = -warp_max(candidate);
#pragma unroll
    for (int i = 0; i < Items; ++i)
      if (name(i) == lowest) key[i] = kNone;
    return lowest;
  }

  // Lane j gets the expert of choice j.
  MOERT_DEVICE_INLINE int choose() const {
    Key key[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) key[i] = expert(i) < call.E ? Keys<Real>::order(selection(i)) : kNone;
    if (call.options.topk_groups < call.options.num_groups) limit_groups(key);
    int mine = 0;
#pragma unroll 1
    for (int j = 0; j < call.k; ++j) {
      const int best = take_best(key, [&](int i) { return expert(i); });
      if (j == lane) mine = best;
    }
    return mine;
  }

  // Lane j gets x of its choice, `otherwise` where it has none.
  MOERT_DEVICE_INLINE Real chosen(int id, Real otherwise) const {
    Real mine = otherwise;
#pragma unroll 1
    for (int j = 0; j < call.k; ++j) {
      const int e = __shfl_sync(kAllLanes, id, j);
      const bool in = e >= 0 && e < call.E;
      const Real there = value(in ? e : 0);
      if (j == lane && in) mine = there;
    }
    return mine;
  }

  // Lane j: the logit of its choice -> its score.  A NaN among all the logits of a softmax is one in every weight.
  MOERT_DEVICE_INLINE Real score_chosen(Real logit) const {
    const Score score = call.options.score;
    if (score == Score::sigmoid) return gate_sigmoid(logit);
    if (score != Score::softmax && score != Score::softmax_over_topk) return logit;
    const bool in = lane < call.k;
    const Real max = warp_max(in && logit == logit ? logit : -Real(INFINITY));
    Real numerator = in ? exp_to_88(logit - max) : Real(0);
    numerator /= warp_sum(numerator);
    if (score == Score::softmax_over_topk) return numerator;
    bool poison = false;
#pragma unroll
    for (int i = 0; i < Items; ++i) poison |= expert(i) < call.E && x[i] != x[i];
    return __any_sync(kAllLanes, poison) ? Real(NAN) : numerator;
  }

  MOERT_DEVICE_INLINE void forward() {
    const GatingOptions& options = call.options;
    const bool limited = options.topk_groups < options.num_groups;
    const bool by_top2 = limited && options.group_score == GroupScore::top2;
    // A score grows with its logit: where nothing is added, the order of the logits is that of the scores before
    // rounding.
    const bool by_logit = !call.bias && !by_top2 && options.score != Score::relu;
    // The denominator of a softmax cancels where the weights are renormalised: then the chosen scores are enough.
    const bool chosen_alone = options.score == Score::softmax_over_topk ||
                              (by_logit && (options.score != Score::softmax || options.renormalize));
    load_any();
    int id = 0;
    if (by_logit) id = choose();
    if (!chosen_alone) score_all();
    if (!by_logit) id = choose();
    Real weight = chosen(id, 0);
    if (chosen_alone) weight = score_chosen(weight);
    if (options.renormalize) weight /= warp_sum(lane < call.k ? weight : Real(0)) + Real(1e-20);
    if (lane >= call.k) return;
    static_cast<Real*>(call.weights)[token * call.k + lane] = weight * Real(options.scale);
    call.ids[token * call.k + lane] = id;
  }

  // Lane j: the gradient of its choice's weight -> that of its logit; `mean` is what a softmax takes off the others.
  MOERT_DEVICE_INLINE Real unweigh(Real d, Real score, Real& mean) const {
    const GatingOptions& options = call.options;
    d *= Real(options.scale);
    if (options.renormalize) {
      const Real denominator = warp_sum(score) + Real(1e-20);
      // The weight is rounded first: that of a single choice is then exactly 1, and its gradient exactly 0.
      d = (d - warp_sum(d * (score / denominator))) / denominator;
    }
    mean = warp_sum(d * score);
    if (options.score == Score::sigmoid) return d * (score * (1 - score));
    if (options.score == Score::relu) return score > 0 ? d : Real(0);
    if (options.score == Score::identity) return d;
    return score * (d - mean);
  }

  template <typename Out>
  MOERT_DEVICE_INLINE void store(const Real (&d)[Items]) const {
    Out* row = static_cast<Out*>(call.dlogits) + token * call.E;
#pragma unroll
    for (int i = 0; i < Items; ++i)
      if (expert(i) < call.E) row[expert(i)] = narrow<Out>(d[i]);
  }

  MOERT_DEVICE_INLINE void backward() {
    const Score score = call.options.score;
    load_any();
    score_all();
    const int id = lane < call.k ? call.ids[token * call.k + lane] : -1;
    const bool in = id >= 0 && id < call.E, over_topk = score == Score::softmax_over_topk;
    Real mine = chosen(id, over_topk ? -Real(INFINITY) : Real(0));
    if (over_topk) {
      const Real max = warp_max(mine == mine ? mine : -Real(INFINITY));
      const Real numerator = in ? exp_to_88(mine - max) : Real(0);
      const Real sum = warp_sum(numerator);
      mine = in ? numerator / sum : Real(0);
    }
    Real d = in ? static_cast<const Real*>(call.weights)[token * call.k + lane] : Real(0), mean;
    d = unweigh(d, mine, mean);
    Real out[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) out[i] = score == Score::softmax ? 0 - x[i] * mean : Real(0);
#pragma unroll 1
    for (int j = 0; j < call.k; ++j) {
      const int e = __shfl_sync(kAllLanes, id, j);
      const Real gradient = __shfl_sync(kAllLanes, d, j);
#pragma unroll
      for (int i = 0; i < Items; ++i)
        if (expert(i) == e) out[i] = gradient;
    }
    if constexpr (sizeof(Real) == 8)
      store<double>(out);
    else if (call.dtype == DType::f32)
      store<float>(out);
    else if (call.dtype == DType::bf16)
      store<bf16>(out);
    else
      store<f16>(out);
  }
};

template <typename Real, int Items, bool Forward>
__global__ void __launch_bounds__(kGatingThreads, 1) gating_kernel(const GatingCall call) {
  const int64_t token = int64_t(blockIdx.x) * (kGatingThreads / kWarp) + warp_id();
  if (token >= call.T) return;  // a whole warp
  GatingRow<Real, Items> row(call, token);
  if constexpr (Forward)
    row.forward();
  else
    row.backward();
}

}  // namespace moert::cuda
