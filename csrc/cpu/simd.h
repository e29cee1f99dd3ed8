// Vectors of the instruction set that a translation unit is compiled for, over GCC's vector types.
// Everything is in an unnamed namespace, and inlined where nothing is said: no symbol may leave the unit, or the linker
// could keep the copy of a newer instruction set for everyone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "moert/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOERT_INLINE inline __attribute__((always_inline))

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

using VecF = Vec<float>;
using VecI = Vec<int32_t>;

// What streams through is prefetched so many bytes ahead at least: as many as come while one of them is waited for.
constexpr int64_t kAheadBytes = 8 << 10;

// The bytes of the blocks of `bytes` each that reach so far.
MOERT_INLINE int64_t whole_blocks_ahead(int64_t bytes, int64_t ahead = kAheadBytes) {
  return bytes > 0 ? (ahead + bytes - 1) / bytes * bytes : 0;
}

template <typename V, typename T>
MOERT_INLINE V bit_cast_vector(const T& x) {
  static_assert(sizeof(V) == sizeof(T));
  V y;
  std::memcpy(&y, &x, sizeof(V));
  return y;
}

template <typename T>
MOERT_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Load kLanes elements and widen them.
MOERT_INLINE VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

MOERT_INLINE Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

MOERT_INLINE VecF load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast_vector<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast_vector<VecF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  VecF x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

MOERT_INLINE VecF load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast_vector<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecF x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// Two bfloat16 that follow each other along K, the first in the low half.
using Pair = uint32_t;

MOERT_INLINE Vec<Pair> load(const Pair* p) {
  Vec<Pair> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Narrow and store kLanes elements, rounding to nearest even.
MOERT_INLINE void store(float* p, const VecF& x) { std::memcpy(p, &x, sizeof x); }

MOERT_INLINE void store(double* p, const Vec<double>& x) { std::memcpy(p, &x, sizeof x); }

MOERT_INLINE void store(Pair* p, const Vec<Pair>& x) { std::memcpy(p, &x, sizeof x); }

MOERT_INLINE void store(bf16* p, const VecF& x) {
#if defined(__AVX512BF16__)  // subnormal numbers become zero
  const __m256bh narrow = _mm512_cvtneps_pbh(__m512(x));
  std::memcpy(p, &narrow, sizeof narrow);
#else
  const Vec<uint32_t> bits = bit_cast_vector<Vec<uint32_t>>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Vec<uint32_t> is_nan = bit_cast_vector<Vec<uint32_t>>((bits & 0x7fffffffu) > 0x7f800000u);
  const Vec<uint32_t> y = (is_nan & (bits >> 16 | 0x40u)) | (~is_nan & rounded);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast_vector<__m512i>(y)));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = uint16_t(y[i]);
#endif
#endif
}

MOERT_INLINE void store(f16* p, const VecF& x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast_vector<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast_vector<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_f16(x[i]);
#endif
}

// Stores past the caches; p is aligned to what one store writes.
template <typename T>
MOERT_INLINE void stream(T* p, const Vec<Acc<T>>& x) {
  T part[kLanes<Acc<T>>] __attribute__((aligned(kVectorBytes)));
  store(part, x);
#if defined(__AVX512F__)
  if constexpr (sizeof part == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(part));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof part == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(part));
#endif
  std::memcpy(p, part, sizeof part);
}

// The first n < kLanes elements; the others are zero.
template <typename T>
MOERT_INLINE Vec<Acc<T>> load_first(const T* p, int64_t n) {
  T part[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <typename T>
MOERT_INLINE void store_first(T* p, const Vec<Acc<T>>& x, int64_t n) {
  T part[kLanes<Acc<T>>];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) std::memcpy(p + i, part + i, sizeof(T));
}

// f(i, n) over [0, size) in steps of one vector; n is the number of elements, kLanes but for the last step.
template <typename A, typename F>
MOERT_INLINE void for_vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) f(i, std::integral_constant<int64_t, kLanes<A>>{});
  if (i < size) f(i, size - i);
}

// With the n of for_vectors: a whole vector, or the first n.
template <typename T, int64_t N>
MOERT_INLINE Vec<Acc<T>> load(const T* p, std::integral_constant<int64_t, N>) {
  return load(p);
}
template <typename T>
MOERT_INLINE Vec<Acc<T>> load(const T* p, int64_t n) {
  return load_first(p, n);
}
template <typename T, int64_t N>
MOERT_INLINE void store(T* p, const Vec<Acc<T>>& x, std::integral_constant<int64_t, N>) {
  store(p, x);
}
template <typename T>
MOERT_INLINE void store(T* p, const Vec<Acc<T>>& x, int64_t n) {
  store_first(p, x, n);
}

// Sum of the lanes, pairwise: the order does not depend on anything but the vector's width.
template <typename V>
MOERT_INLINE auto sum_lanes(const V& x) {
  constexpr int n = int(sizeof(V) / sizeof(x[0]));
  std::remove_cv_t<std::remove_reference_t<decltype(x[0])>> part[n];
  std::memcpy(part, &x, sizeof x);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// Exchange the off-diagonal blocks of `width` lanes between a and b: one step of a transposition.
template <int width, typename V, size_t... I>
MOERT_INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I));
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, (int(I) & width ? int(I) - width + n : int(I))...);
  const V high = __builtin_shufflevector(a, b, (int(I) & width ? int(I) + n : int(I) + width)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  const V low = __builtin_shuffle(a, b, Mask{(int(I) & width ? int(I) - width + n : int(I))...});
  const V high = __builtin_shuffle(a, b, Mask{(int(I) & width ? int(I) + n : int(I) + width)...});
#endif
  a = low;
  b = high;
}

template <int width, typename V>
MOERT_INLINE void exchange(V& a, V& b) {
  exchange<width>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}

// sum + x * y; of pairs both products are added, without the rounding in between (subnormal numbers count as zero).
template <typename V>
MOERT_INLINE V multiply_add(const V& sum, const V& x, const V& y) {
  return sum + x * y;
}
#if defined(__AVX512BF16__)
MOERT_INLINE VecF multiply_add(const VecF& sum, const Vec<Pair>& x, const Vec<Pair>& y) {
  return VecF(_mm512_dpbf16_ps(__m512(sum), bit_cast_vector<__m512bh>(x), bit_cast_vector<__m512bh>(y)));
}
#endif

// As many vectors as one has lanes, transposed as a square; width is half of that.
template <int width, typename V>
MOERT_INLINE void transpose(V* rows) {
  constexpr int lanes = int(sizeof(V) / sizeof(rows[0][0]));
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (!(i & width)) exchange<width>(rows[i], rows[i + width]);
  if constexpr (width > 1) transpose<width / 2>(rows);
}

// In every 16 bytes the first half (or the second) of a's elements and of b's, by turns.
template <int half, typename V, size_t... I>
MOERT_INLINE V interleave(const V& a, const V& b, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I)), k = int(16 / sizeof(a[0]));
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (int(I) % 2 * n + int(I) / k * k + half * k / 2 + int(I) % k / 2)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Mask{(int(I) % 2 * n + int(I) / k * k + half * k / 2 + int(I) % k / 2)...});
#endif
}

template <int half, typename T>
MOERT_INLINE VecI interleave(const VecI& a, const VecI& b) {
  const auto x = bit_cast_vector<Vec<T>>(a), y = bit_cast_vector<Vec<T>>(b);
  return bit_cast_vector<VecI>(interleave<half>(x, y, std::make_index_sequence<kLanes<T>>{}));
}

// The words of 4 vectors as 4 x 4 in every 16 bytes, transposed.
MOERT_INLINE void transpose_words(VecI* x) {
  const VecI low = interleave<0, int32_t>(x[0], x[1]), high = interleave<1, int32_t>(x[0], x[1]);
  const VecI low2 = interleave<0, int32_t>(x[2], x[3]), high2 = interleave<1, int32_t>(x[2], x[3]);
  x[0] = interleave<0, int64_t>(low, low2);
  x[1] = interleave<1, int64_t>(low, low2);
  x[2] = interleave<0, int64_t>(high, high2);
  x[3] = interleave<1, int64_t>(high, high2);
}

// a, b: 2n elements in order -> those of even places and those of odd ones.
template <typename V, size_t... I>
MOERT_INLINE void split_even_odd(V& a, V& b, std::index_sequence<I...>) {
#if defined(__clang__)
  const V even = __builtin_shufflevector(a, b, int(2 * I)...), odd = __builtin_shufflevector(a, b, int(2 * I + 1)...);
#else
  const VecI even_places = {int32_t(2 * I)...};
  const V even = __builtin_shuffle(a, b, even_places), odd = __builtin_shuffle(a, b, even_places + 1);
#endif
  a = even;
  b = odd;
}

// sums[i] (+)= sum of the lanes of x[i], i < 4, in the order of sum_lanes.
template <typename A>
MOERT_INLINE void add_lanes_of_four(const Vec<A>* x, A* sums, bool accumulate) {
  constexpr int L = kLanes<A>;
  if constexpr (L < 4) {
    for (int i = 0; i < 4; ++i) sums[i] = (accumulate ? sums[i] : A(0)) + sum_lanes(x[i]);
  } else {
    Vec<A> a = x[0], b = x[1], c = x[2], d = x[3];
    exchange<L / 2>(a, b);
    exchange<L / 2>(c, d);
    Vec<A> ab = a + b, cd = c + d;  // halves: a, b and c, d
    exchange<L / 4>(ab, cd);
    Vec<A> acbd = ab + cd;  // quarters
    if constexpr (L >= 16) {
      Vec<A> other = acbd, copy = acbd;
      exchange<2>(other, copy);
      acbd = other + copy;
    }
    if constexpr (L >= 8) {
      Vec<A> other = acbd, copy = acbd;
      exchange<1>(other, copy);
      acbd = other + copy;
    }
    for (int i = 0; i < 4; ++i)
      sums[i] = (accumulate ? sums[i] : A(0)) + acbd[(i & 1 ? 2 : 0) * (L / 4) + (i >> 1) * (L / 4)];
  }
}

// mask lanes are all ones or zero.
template <typename V, typename M>
MOERT_INLINE V select(const M& mask, const V& a, const V& b) {
  return mask ? a : b;
}

template <typename V>
MOERT_INLINE V min(const V& a, const V& b) {  // NaN in a stays
  return b < a ? b : a;
}
template <typename V>
MOERT_INLINE V max(const V& a, const V& b) {
  return b > a ? b : a;
}

// exp within 2 units in the last place: 2^n * p(r), r in [-ln2/2, ln2/2]; underflows to 0, overflows to infinity.
MOERT_INLINE VecF exp(const VecF& x) {
  const VecF t = min(max(x, splat(-104.0f)), splat(89.0f));
  const VecF shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = (t * 1.44269504089f + shifter) - shifter;
  VecF r = t - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VecF p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n reaches -150 where the result is subnormal.
  const VecI i = __builtin_convertvector(n, VecI), half = i >> 1;
  const VecF a = bit_cast_vector<VecF>((half + 127) << 23), b = bit_cast_vector<VecF>((i - half + 127) << 23);
  return select(x == x, p * a * b, x);
}

template <typename F>
MOERT_INLINE Vec<double> per_lane(const Vec<double>& x, const F& f) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = f(x[i]);
  return y;
}

// A call for each lane: one more is nothing, and inlined they would be most of the code of activations.
__attribute__((noinline)) Vec<double> exp(const Vec<double>& x) {
  return per_lane(x, [](double v) { return ::exp(v); });
}

__attribute__((noinline)) VecF erf(const VecF& x) {
  VecF y;
  for (int i = 0; i < kLanes<float>; ++i) y[i] = ::erff(x[i]);
  return y;
}

__attribute__((noinline)) Vec<double> erf(const Vec<double>& x) {
  return per_lane(x, [](double v) { return ::erf(v); });
}

template <typename V>
MOERT_INLINE V sigmoid(const V& x) {
  return 1 / (1 + exp(-x));
}

}  // namespace
}  // namespace moert::cpu
