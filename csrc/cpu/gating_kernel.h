// The gating kernel, written once over the vectors of simd.h.  A lane is a token: nothing is summed across lanes, so
// neither the width of a vector (with -ffp-contract=off) nor the tokens beside it can change a bit.
#pragma once

#include "cpu/gating_isa.h"
#include "cpu/simd.h"

namespace moert::cpu {
namespace {

MOERT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

MOERT_INLINE int64_t whole_blocks(int64_t n) { return (n + 15) / 16 * 16; }

// e^x for x < 88, to 0.97 ulp; 0 below -87.33, where float32 has no normal numbers; NaN stays.
MOERT_INLINE VecF exp_to_88(VecF x) {
  // n = round(x / ln 2), left in the low bits by the addition of 1.5 * 2^23; r = x - n ln 2, ln 2 in two parts.
  const VecF shifted = x * 1.44269504f + 12582912.0f;
  const VecF n = shifted - 12582912.0f;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // (e^r - 1 - r) / r^2 to 3.1e-9, minimax.
  VecF p = r * 1.3814304256811738e-3f + 8.36885254830122e-3f;
  p = p * r + 4.1668400168418884e-2f;
  p = p * r + 1.666651964187622e-1f;
  p = p * r + 4.999999403953552e-1f;
  const VecF y = (p * (r * r) + r) + 1.0f;
  const VecI power = (bit_cast_vector<VecI>(shifted) + 127) << 23;
  return x < -87.33f ? VecF{} : y * bit_cast_vector<VecF>(power);
}

MOERT_INLINE Vec<double> exp_to_88(Vec<double> x) { return exp(x); }

// a and b change places in the lanes where `wanted` is all ones.  One blend: GCC makes a mask of its own for each.
template <typename Ints>
MOERT_INLINE void exchange(Ints wanted, Ints& a, Ints& b) {
  const Ints both = a ^ b;
  b = wanted ? a : b;
  a = both ^ b;
}

// The larger of a and b to a, the smaller to b.
template <typename V>
MOERT_INLINE void order_pair(V& a, V& b) {
  const V larger = a > b ? a : b;
  b = a > b ? b : a;
  a = larger;
}

// One step of a bitonic network: pairs that are Step apart, descending in blocks of Block, ascending in every second.
template <int Step, int Block, int N, typename V>
MOERT_INLINE void network_step(V (&x)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (!(i & Step)) i& Block ? order_pair(x[i | Step], x[i]) : order_pair(x[i], x[i | Step]);
}

template <int Step, int Block, int N, typename V>
MOERT_INLINE void merge_blocks(V (&x)[N]) {
  network_step<Step, Block>(x);
  if constexpr (Step > 1) merge_blocks<Step / 2, Block>(x);
}

template <int Block = 2, int N, typename V>
MOERT_INLINE void sort_descending(V (&x)[N]) {
  merge_blocks<Block / 2, Block>(x);
  if constexpr (Block < N) sort_descending<2 * Block>(x);
}

template <typename Real>
struct Gating {
  static constexpr int lanes = kLanes<Real>;
  using Int = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  using Reals = Vec<Real>;
  using Ints = Vec<Int>;

  // Selection scores as integers in the same order: no choice at all, then NaN, then -inf to inf.  They differ also
  // where an expert has taken the last 8 bits.
  static constexpr Int kMax = Int(~uint64_t(0) >> (65 - 8 * sizeof(Int)));
  static constexpr Int kNone = -kMax - 1;
  static constexpr Int kNan = kNone + 0x100;
  static constexpr Real kInf = Real(__builtin_inf());

  static MOERT_INLINE Ints order(Reals x) {
    const Ints bits = bit_cast_vector<Ints>(x + Real(0));  // -0 becomes 0
    const Ints key = bits ^ (bits >> (8 * sizeof(Int) - 1) & kMax);
    return x == x ? key : splat(kNan);
  }

  // rows[e] = logits of expert e for the tokens from `token` on; lanes beyond T repeat the last token.
  template <typename In>
  static void load_rows(const GatingCall& call, int64_t token, Reals* rows) {
    const In* source[lanes];
    for (int lane = 0; lane < lanes; ++lane)
      source[lane] = static_cast<const In*>(call.logits) + smaller(token + lane, call.T - 1) * call.stride;
    for (int64_t e = 0; e < call.E; e += lanes) {
      Reals tile[lanes];
      if (const int64_t width = call.E - e; width < lanes) {
        for (int lane = 0; lane < lanes; ++lane) tile[lane] = load_first(source[lane] + e, width);
      } else {
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) tile[lane] = load(source[lane] + e);
      }
      transpose<lanes / 2>(tile);
      for (int i = 0; i < lanes; ++i) rows[e + i] = tile[i];
    }
  }

  // out [count, n] = the first `count` lanes of rows [n], which can be read in whole blocks.
  template <typename V, typename Out>
  static void store_rows(const V* rows, int64_t n, int64_t count, Out* out) {
    for (int64_t e = 0; e < n; e += lanes) {
      Reals tile[lanes];
      for (int i = 0; i < lanes; ++i) tile[i] = bit_cast_vector<Reals>(rows[e + i]);
      transpose<lanes / 2>(tile);
      const int64_t width = smaller(lanes, n - e);
      for (int64_t lane = 0; lane < count; ++lane) {
        Out* target = out + lane * n + e;
        if (width == lanes)
          store(target, tile[lane]);
        else
          store_first(target, tile[lane], width);
      }
    }
  }

  static void load_any(const GatingCall& call, int64_t token, Reals* rows) {
    if constexpr (sizeof(Real) == 8)
      return load_rows<double>(call, token, rows);
    else if (call.dtype == DType::f32)
      return load_rows<float>(call, token, rows);
    else if (call.dtype == DType::bf16)
      return load_rows<bf16>(call, token, rows);
    else
      return load_rows<f16>(call, token, rows);
  }

  static void store_any(const GatingCall& call, int64_t token, int64_t count, const Reals* rows) {
    const auto store_as = [&](auto* dlogits) { store_rows(rows, call.E, count, dlogits + token * call.E); };
    if constexpr (sizeof(Real) == 8)
      return store_as(static_cast<double*>(call.dlogits));
    else if (call.dtype == DType::f32)
      return store_as(static_cast<float*>(call.dlogits));
    else if (call.dtype == DType::bf16)
      return store_as(static_cast<bf16*>(call.dlogits));
    else
      return store_as(static_cast<f16*>(call.dlogits));
  }

  // The choices of `count` tokens: weights and ids [k], which can be read in whole blocks.
  static void store_choices(const GatingCall& call, int64_t token, int64_t count, const Reals* weights,
                            const Ints* ids) {
    const int64_t k = call.k;
    store_rows(weights, k, count, static_cast<Real*>(call.weights) + token * k);
    int32_t* out = call.ids + token * k;
    if constexpr (sizeof(Int) == 4)  // moved as floats, bit for bit
      return store_rows(ids, k, count, reinterpret_cast<float*>(out));
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t j = 0; j < k; ++j) out[lane * k + j] = int32_t(ids[j][lane]);
  }

  // rows = e^(rows - max), returns their sum: four partial sums in the order of the experts.
  static Reals softmax_numerators(int64_t n, Reals* rows) {
    Reals max = splat(-kInf), sums[4] = {};
    for (int64_t e = 0; e < n; ++e) max = rows[e] > max ? rows[e] : max;
    for (int64_t e = 0; e < n; ++e) {
      rows[e] = exp_to_88(rows[e] - max);
      sums[e % 4] += rows[e];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  static MOERT_INLINE Reals sigmoid(Reals x) {
    constexpr Real kLowest = sizeof(Real) == 8 ? -708 : -87.33;  // below, it is no normal number
    return x < kLowest ? Reals{} : 1 / (1 + exp_to_88(-x));
  }

  static void divide(int64_t n, Reals denominator, Reals* rows) {
    for (int64_t i = 0; i < n; ++i) rows[i] /= denominator;
  }

  // rows = scores, but those of the chosen only where they alone decide (softmax_over_topk).
  static void score_rows(const GatingCall& call, Reals* rows) {
    const Score score = call.options->score;
    if (score == Score::softmax) divide(call.E, softmax_numerators(call.E, rows), rows);
    if (score == Score::sigmoid)
      for (int64_t e = 0; e < call.E; ++e) rows[e] = sigmoid(rows[e]);
    if (score == Score::relu)
      for (int64_t e = 0; e < call.E; ++e) rows[e] = rows[e] < 0 ? Reals{} : rows[e];
  }

  // weights [k] = scores, in: logits of the choices.  A NaN among all the logits of a softmax is one in every weight.
  static void score_chosen(const GatingCall& call, const Reals* rows, Reals* weights) {
    const Score score = call.options->score;
    for (int64_t j = 0; score == Score::sigmoid && j < call.k; ++j) weights[j] = sigmoid(weights[j]);
    if (score != Score::softmax && score != Score::softmax_over_topk) return;
    divide(call.k, softmax_numerators(call.k, weights), weights);
    if (score == Score::softmax_over_topk) return;
    constexpr int kChains = lanes < 4 ? lanes : 4;  // none waits for the others; rows beyond E are zero
    Reals poison[kChains] = {};
    for (int64_t e = 0; e < call.E; e += kChains)
      for (int i = 0; i < kChains; ++i) poison[i] = rows[e + i] == rows[e + i] ? poison[i] : rows[e + i];
    for (int i = 1; i < kChains; ++i) poison[0] += poison[i];
    for (int64_t j = 0; j < call.k; ++j) weights[j] += poison[0];
  }

  static MOERT_INLINE Reals selection(const GatingCall& call, const Reals* rows, int64_t e) {
    return call.bias ? rows[e] + static_cast<const Real*>(call.bias)[e] : rows[e];
  }

  // allowed[g] = all ones where group g is among the best.
  static void limit_groups(const GatingCall& call, const Reals* rows, Ints* scores, Ints* allowed) {
    const GatingOptions& options = *call.options;
    const int64_t G = options.num_groups, size = call.E / G;
    const Reals lowest = splat(-kInf);
    for (int64_t g = 0; g < G; ++g) {
      Reals first = lowest, second = lowest;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        const Reals x = selection(call, rows, e);  // a NaN is above nothing
        const Reals loser = x > first ? first : x;
        first = x > first ? x : first;
        second = loser > second ? loser : second;
      }
      scores[g] = order(options.group_score == GroupScore::top2 ? first + second : first);
    }
    for (int64_t g = 0; g < G; ++g) {
      Ints better = {};
      for (int64_t h = 0; h < G; ++h) better -= h < g ? scores[h] >= scores[g] : scores[h] > scores[g];
      allowed[g] = better < Int(options.topk_groups);
    }
  }

  // keys [E, in whole blocks] = selection scores as integers; what may not be chosen has none.
  static void order_rows(const GatingCall& call, const Reals* rows, const Ints* allowed, Ints* keys) {
    const auto* bias = static_cast<const Real*>(call.bias);  // as selection, with the choice outside of the loop
    for (int64_t e = 0; !bias && e < call.E; ++e) keys[e] = order(rows[e]);
    for (int64_t e = 0; bias && e < call.E; ++e) keys[e] = order(rows[e] + bias[e]);
    const int64_t groups = call.options->num_groups, size = call.E / groups;
    for (int64_t g = 0; allowed && g < groups; ++g)
      for (int64_t e = g * size; e < (g + 1) * size; ++e) keys[e] = allowed[g] ? keys[e] : splat(kNone);
    for (int64_t e = call.E; e < whole_blocks(call.E); ++e) keys[e] = splat(kNone);
  }

#if defined(__AVX2__)
  // Selection by sorting networks over N experts at a time, k <= N, descending.  A score and its expert share one
  // integer, the lower expert above the higher, so that no two are equal and a minimum and a maximum order a pair.
  // lost (may be null) gets the largest of what is not among the N.
  template <int N, typename V, typename Packed>
  static MOERT_INLINE void largest(int64_t E, const Packed& packed, V* best, V* lost) {
    V list[N], next[N];
    for (int i = 0; i < N; ++i) list[i] = packed(i);
    sort_descending(list);
    for (int64_t e = N; e < E; e += N) {
      for (int i = 0; i < N; ++i) next[i] = packed(e + i);
      sort_descending(next);
      for (int i = 0; i < N; ++i) {
        order_pair(list[i], next[N - 1 - i]);
        if (lost) *lost = next[N - 1 - i] > *lost ? next[N - 1 - i] : *lost;
      }
      merge_blocks<N / 2, N>(list);
    }
    for (int i = 0; i < N; ++i) best[i] = list[i];
  }

  // ids [k] of a lane, which are the choices, in descending order of their keys; equal ones keep theirs.
  static void order_choices(int64_t k, const Ints* keys, int lane, Ints* ids) {
    for (int64_t i = 1; i < k; ++i) {
      const Int id = ids[i][lane];
      int64_t j = i;
      for (; j > 0 && keys[ids[j - 1][lane]][lane] < keys[id][lane]; --j) ids[j][lane] = ids[j - 1][lane];
      ids[j][lane] = id;
    }
  }

  // The expert takes the place of a score's last bits, 8 at most.  False where those could have decided who is chosen:
  // then ids are not set.  They are zero in logits of 16 bits (exact), and rarely decide among others.
  template <int N>
  static bool select_by_high_bits(const GatingCall& call, const Ints* keys, bool exact, Ints* ids) {
    Int expert = 15;
    while (expert < call.E - 1) expert = 2 * expert + 1;
    Ints best[N], lost = splat(kNone), clash = {};
    const auto packed = [&](int64_t e) { return (keys[e] & ~expert) | (expert - Int(e)); };
    largest<N>(call.E, packed, best, exact ? nullptr : &lost);
    const auto agree = [&](Ints a, Ints b) { return ((a ^ b) & ~expert) == 0; };
    if (!exact) {
      const Ints left_out = agree(best[call.k - 1], call.k < N ? best[call.k] : lost);
      for (int lane = 0; lane < lanes; ++lane)
        if (left_out[lane]) return false;
      for (int64_t j = 1; j < call.k; ++j) clash |= agree(best[j - 1], best[j]);
    }
    for (int64_t j = 0; j < call.k; ++j) ids[j] = expert - (best[j] & expert);
    for (int lane = 0; lane < lanes; ++lane)
      if (clash[lane]) order_choices(call.k, keys, lane, ids);
    return true;
  }

  // All bits of the score above those of the expert, in 64 bits; half the lanes at a time.
  template <int N>
  static void select_by_all_bits(const GatingCall& call, const Ints* keys, Ints* ids) {
    typedef Int Half __attribute__((vector_size(kVectorBytes / 2)));
    using Wide = Vec<int64_t>;
    for (int half = 0; half < 2; ++half) {
      const auto packed = [&](int64_t e) {
        Half part;
        std::memcpy(&part, reinterpret_cast<const char*>(keys + e) + half * sizeof part, sizeof part);
        return (__builtin_convertvector(part, Wide) << 32) + int64_t(0xffffffff - e);
      };
      Wide best[N];
      largest<N, Wide>(call.E, packed, best, nullptr);
      for (int64_t j = 0; j < call.k; ++j) {
        const Half part = __builtin_convertvector(0xffffffff - (best[j] & 0xffffffff), Half);
        std::memcpy(reinterpret_cast<char*>(ids + j) + half * sizeof part, &part, sizeof part);
      }
    }
  }

  template <int N>
  static void select_sorted(const GatingCall& call, const Ints* keys, bool exact, Ints* ids) {
    if (call.E > 256 || !select_by_high_bits<N>(call, keys, exact, ids)) select_by_all_bits<N>(call, keys, ids);
  }
#endif

  // best and ids [k] = the largest selection scores in descending order: an insertion sort that moves four experts at
  // a time down the list.  From the last expert to the first, so that whoever comes from above wins a tie.
  static void select(const GatingCall& call, const Ints* keys, [[maybe_unused]] bool exact, Ints* best, Ints* ids) {
#if defined(__AVX2__)
    if constexpr (sizeof(Real) == 4) {
      if (2 < call.k && call.k <= 8) return select_sorted<8>(call, keys, exact, ids);
      if (8 < call.k && call.k <= 16) return select_sorted<16>(call, keys, exact, ids);
    }
#endif
    const int64_t E = call.E, k = call.k;
    for (int64_t j = 0; j < k; ++j) best[j] = splat(kNone), ids[j] = Ints{};
    for (int64_t last = E - 1; last >= 0; last -= 4) {
      Ints next[4], names[4];
      for (int i = 0; i < 4; ++i) {
        next[i] = last >= i ? keys[last - i] : splat(kNone);
        names[i] = splat(Int(last - i));
      }
      const int64_t filled = smaller(k, E - last + 3);
      for (int64_t j = 0; j < filled; ++j) {
        Ints key = best[j], name = ids[j];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Ints wins = next[i] >= key;
          exchange(wins, next[i], key);
          exchange(wins, names[i], name);
        }
        best[j] = key;
        ids[j] = name;
      }
    }
  }

  // weights [k] in: scores of the choices; out: what a token multiplies its experts by.
  static void weigh(const GatingCall& call, Reals* weights) {
    const GatingOptions& options = *call.options;
    Reals sum = {};
    for (int64_t j = 0; j < call.k; ++j) sum += weights[j];
    const Reals denominator = options.renormalize ? sum + Real(1e-20) : splat(Real(1));
    for (int64_t j = 0; j < call.k; ++j) weights[j] = weights[j] / denominator * Real(options.scale);
  }

  // Tokens [token, token + count), count <= lanes.
  static void forward(const GatingCall& call, int64_t token, int64_t count, void* scratch) {
    const GatingOptions& options = *call.options;
    const int64_t E = call.E, k = call.k, G = options.num_groups;
    Reals* rows = static_cast<Reals*>(scratch);
    Ints* keys = reinterpret_cast<Ints*>(rows + whole_blocks(E));
    Reals* weights = rows + 2 * whole_blocks(E);
    Ints* ids = reinterpret_cast<Ints*>(weights + whole_blocks(k));
    Ints* best = ids + whole_blocks(k);
    Ints* groups = best + whole_blocks(k);
    const bool limited = options.topk_groups < G;
    const bool by_top2 = limited && options.group_score == GroupScore::top2;
    // A score grows with its logit: where nothing is added, the order of the logits is that of the scores before
    // rounding.
    const bool by_logit = !call.bias && !by_top2 && options.score != Score::relu;

    const auto choose = [&] {
      if (limited) limit_groups(call, rows, groups, groups + G);
      order_rows(call, rows, limited ? groups + G : nullptr, keys);
      select(call, keys, by_logit && call.dtype != DType::f32, best, ids);
    };
    load_any(call, token, rows);
    if (by_logit) choose();
    // The denominator of a softmax cancels where the weights are renormalised: then the chosen scores are enough.
    const bool chosen_alone = options.score == Score::softmax_over_topk ||
                              (by_logit && (options.score != Score::softmax || options.renormalize));
    if (!chosen_alone) score_rows(call, rows);
    if (!by_logit) choose();
    for (int64_t j = 0; j < k; ++j)
      for (int lane = 0; lane < lanes; ++lane) weights[j][lane] = rows[ids[j][lane]][lane];
    if (chosen_alone) score_chosen(call, rows, weights);
    weigh(call, weights);
    store_choices(call, token, count, weights, ids);
  }

  // dweights -> dscores, in place: through the scale and the renormalisation.
  static void unweigh(const GatingCall& call, const Reals* scores, Reals* dweights) {
    const GatingOptions& options = *call.options;
    Reals sum = {}, mean = {};
    for (int64_t j = 0; j < call.k; ++j) {
      dweights[j] *= Real(options.scale);
      sum += scores[j];
    }
    if (!options.renormalize) return;
    const Reals denominator = sum + Real(1e-20);
    // Each weight is rounded first: that of a single choice is then exactly 1, and its gradient exactly 0.
    for (int64_t j = 0; j < call.k; ++j) mean += dweights[j] * (scores[j] / denominator);
    for (int64_t j = 0; j < call.k; ++j) dweights[j] = (dweights[j] - mean) / denominator;
  }

  // dscores -> dlogits of the choices, in place; the softmaxes subtract the mean of dscores, which is returned.
  static Reals unscore(const GatingCall& call, const Reals* scores, Reals* dscores) {
    const Score score = call.options->score;
    Reals mean = {};
    for (int64_t j = 0; j < call.k; ++j) mean += dscores[j] * scores[j];
    for (int64_t j = 0; j < call.k; ++j) {
      if (score == Score::sigmoid)
        dscores[j] *= scores[j] * (1 - scores[j]);
      else if (score == Score::relu)
        dscores[j] = scores[j] > 0 ? dscores[j] : Reals{};
      else if (score != Score::identity)
        dscores[j] = scores[j] * (dscores[j] - mean);
    }
    return mean;
  }

  static void backward(const GatingCall& call, int64_t token, int64_t count, void* scratch) {
    const Score score = call.options->score;
    const int64_t E = call.E, k = call.k;
    Reals* rows = static_cast<Reals*>(scratch);
    Reals* scores = rows + whole_blocks(E);
    Reals* d = scores + k;
    load_any(call, token, rows);
    score_rows(call, rows);

    const int32_t* ids = call.ids + token * k;
    const Real* dweights = static_cast<const Real*>(call.weights) + token * k;
    const bool over_topk = score == Score::softmax_over_topk;
    const auto kept = [&](int64_t lane, int64_t j) {
      return lane < count && ids[lane * k + j] >= 0 && ids[lane * k + j] < E;
    };
    for (int64_t j = 0; j < k; ++j)
      for (int lane = 0; lane < lanes; ++lane) {
        const bool in = kept(lane, j);
        scores[j][lane] = in ? rows[ids[lane * k + j]][lane] : over_topk ? -kInf : Real(0);
        d[j][lane] = in ? dweights[lane * k + j] : Real(0);
      }
    if (over_topk) divide(k, softmax_numerators(k, scores), scores);
    unweigh(call, scores, d);
    const Reals mean = unscore(call, scores, d);
    for (int64_t e = 0; e < E; ++e) rows[e] = score == Score::softmax ? 0 - rows[e] * mean : Reals{};
    for (int64_t j = 0; j < k; ++j)
      for (int lane = 0; lane < lanes; ++lane)
        if (kept(lane, j)) rows[ids[lane * k + j]][lane] = d[j][lane];
    store_any(call, token, count, rows);
  }
};

// The logits of `count` tokens, on their way from memory: each row is short, so that the CPU foresees little.
MOERT_INLINE void fetch_tokens(const GatingCall& call, int64_t token, int64_t count) {
  const int64_t size = size_of(call.dtype);
  for (int64_t t = token; t < token + count; ++t) {
    const char* row = static_cast<const char*>(call.logits) + t * call.stride * size;
    for (int64_t i = 0; i < call.E * size; i += 64) __builtin_prefetch(row + i);
  }
}

template <typename Real>
void forward_tokens(const GatingCall& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t step = kLanes<Real>;
  for (int64_t t = begin; t < end; t += step) {
    fetch_tokens(call, t + step, smaller(step, end - t - step));
    Gating<Real>::forward(call, t, smaller(step, end - t), scratch);
  }
}

template <typename Real>
void backward_tokens(const GatingCall& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t step = kLanes<Real>;
  for (int64_t t = begin; t < end; t += step) Gating<Real>::backward(call, t, smaller(step, end - t), scratch);
}

}  // namespace
}  // namespace moert::cpu
