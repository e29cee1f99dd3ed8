#include "moert/permute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/permute_isa.h"
#include "moert/check.h"
#include "moert/dispatch.h"
#include "moert/isa.h"

namespace moert::cpu {

namespace {

constexpr int64_t kParallelPlan = 64 * 1024;  // choices; fewer are sorted before a second thread has woken

const PermuteKernels& kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::permute_kernels;
  if (isa() >= Isa::avx2) return avx2::permute_kernels;
#endif
  return generic::permute_kernels;
}

// Plans may come from a caller: none of their numbers reaches an address before this.
void check_range(const char* name, const int32_t* index, int64_t count, const char* letter, int64_t n) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= uint32_t(index[i]) + 1u <= uint32_t(n);
  if (good) return;
  const auto* bad = std::find_if(index, index + count, [n](int32_t i) { return i < -1 || i >= n; });
  MOERT_CHECK(false, name, " must hold -1 or be in [0, ", letter, "=", n, "), got ", *bad);
}

// Choices [first, last) of the sort: next[e] is the next free slot of expert e, end[e] the first that is not its own.
void place(const int32_t* ids, int64_t k, int64_t E, int64_t first, int64_t last, const int32_t* end, int32_t* next,
           int32_t* tokens, int32_t* slots) {
  int64_t token = first / k, left = k - first % k;
  for (int64_t i = first; i < last; ++i) {
    const bool kept = ids[i] >= 0 && ids[i] < E && next[ids[i]] < end[ids[i]];
    slots[i] = kept ? next[ids[i]]++ : -1;
    if (kept) tokens[slots[i]] = int32_t(token);
    if (--left == 0) ++token, left = k;
  }
}

// unpermute_rows, wherever the rows lie.
void add_rows(const RowPlaces& places, DType dtype, const int32_t* slots, const void* weights, const void* residual,
              int64_t residual_stride, int64_t T, int64_t k, int64_t S, int64_t H, int64_t threads, void* y) {
  check_range("slots", slots, T * k, "S", S);
  const auto sum_rows = kernels().sum_rows;
  const int64_t size = size_of(dtype), weight_size = dtype == DType::f64 ? 8 : 4;
  advise_huge_pages(y, T * H * size);
  parallel_for_rows(T, (k + 1) * H * size, threads, [&](int64_t t) {
    const void* w = weights ? static_cast<const char*>(weights) + t * k * weight_size : nullptr;
    const void* start = residual ? static_cast<const char*>(residual) + t * residual_stride * size : nullptr;
    const int32_t *own = slots + t * k, *next = t + 1 < T ? own + k : nullptr;
    sum_rows({dtype, k, H, places, own, w, start, static_cast<char*>(y) + t * H * size, next});
  });
}

}  // namespace

void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t capacity, int64_t threads,
                  int32_t* offsets, int32_t* tokens, int32_t* slots) {
  const int64_t n = T * k;
  // One histogram a chunk; it must not cost more than the chunk itself.
  const int64_t chunks = n < kParallelPlan ? 1 : std::clamp<int64_t>(n / (E + 1), 1, std::max<int64_t>(1, threads));
  const auto first = [&](int64_t chunk) { return n * chunk / chunks; };
  std::vector<int32_t> next(chunks * E, 0);  // [chunks, E]
  parallel_for(chunks, threads, [&](int64_t chunk) {
    int32_t* count = next.data() + chunk * E;
    for (int64_t i = first(chunk); i < first(chunk + 1); ++i)
      if (ids[i] >= 0 && ids[i] < E) ++count[ids[i]];
  });

  int32_t slot = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (capacity >= 0) slot = int32_t(e * capacity);
    offsets[e] = slot;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int32_t count = next[chunk * E + e];
      next[chunk * E + e] = slot;
      slot = int32_t(std::min<int64_t>(slot + int64_t(count), INT32_MAX));  // beyond the capacity all are dropped
    }
  }
  offsets[E] = capacity < 0 ? slot : int32_t(E * capacity);

  if (capacity < 0)
    std::fill(tokens + slot, tokens + n, -1);
  else
    std::fill_n(tokens, E * capacity, -1);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    if (k > 0) place(ids, k, E, first(chunk), first(chunk + 1), offsets + 1, next.data() + chunk * E, tokens, slots);
  });
}

void check_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t S, const int32_t* offsets,
                const int32_t* tokens, const int32_t* slots) {
  bool good = offsets[0] == 0 && offsets[E] <= S;
  for (int64_t e = 0; e < E; ++e) good &= offsets[e] <= offsets[e + 1];
  MOERT_CHECK(good, "offsets must ascend from 0 to at most S=", S, ", got others");
  // The same walk as that of the sort, so that nothing else passes.
  std::vector<int32_t> next(offsets, offsets + E);
  for (int64_t i = 0; i < T * k && good; ++i) {
    const bool kept = ids[i] >= 0 && ids[i] < E;
    const int32_t slot = kept ? next[ids[i]]++ : -1;
    good = slots[i] == slot && (!kept || (slot < offsets[ids[i] + 1] && tokens[slot] == i / k));
  }
  for (int64_t e = 0; e < E; ++e) good &= next[e] == offsets[e + 1];
  MOERT_CHECK(good, "slots must be those of the plan of ids (permute_plan), got others");
}

void permute_rows(const void* x, int64_t x_stride, DType dtype, const int32_t* tokens, int64_t T, int64_t S, int64_t H,
                  int64_t threads, void* rows) {
  check_range("tokens", tokens, S, "T", T);
  if (H == 0) return;
  const int64_t size = size_of(dtype), bytes = H * size;
  advise_huge_pages(rows, S * bytes);
  const auto row = [&](int64_t s) { return static_cast<char*>(rows) + s * bytes; };
  const auto from = [&](int64_t t) { return static_cast<const char*>(x) + t * x_stride * size; };
  if (S * bytes < kStreamBytes) {
    parallel_for_rows(S, bytes, threads, [&](int64_t s) {
      if (tokens[s] < 0) return void(std::memset(row(s), 0, bytes));
      std::memcpy(row(s), from(tokens[s]), bytes);
    });
    return;
  }
  // Token by token, past the caches: each row of x is read from memory once for all of its slots.
  std::vector<int32_t> first(T + 1), slots(S), places(S);  // slots of token t: slots[first[t]] .. slots[first[t+1]-1]
  permute_plan(tokens, S, 1, T, -1, threads, first.data(), slots.data(), places.data());
  const auto stream_row = kernels().stream_row;
  parallel_for_rows(T, S * bytes / std::max<int64_t>(1, T), threads, [&](int64_t t) {
    for (int32_t i = first[t]; i < first[t + 1]; ++i) stream_row(from(t), row(slots[i]), bytes);
  });
  parallel_for_rows(S, bytes, threads, [&](int64_t s) {
    if (tokens[s] < 0) std::memset(row(s), 0, bytes);
  });
}

void unpermute_rows(const void* rows, int64_t rows_stride, DType dtype, const int32_t* slots, const void* weights,
                    const void* residual, int64_t residual_stride, int64_t T, int64_t k, int64_t S, int64_t H,
                    int64_t threads, void* y) {
  const RowPlaces places{rows, rows_stride, nullptr, 0, INT32_MAX, INT32_MAX};
  add_rows(places, dtype, slots, weights, residual, residual_stride, T, k, S, H, threads, y);
}

void dispatch_combine(const Returned& r, int64_t threads, void* y) {
  const RowPlaces places{r.rows, r.rows_stride, r.own, r.own_stride, int32_t(r.first), int32_t(r.first + r.O)};
  add_rows(places, r.dtype, r.slots, nullptr, r.residual, r.residual_stride, r.T, r.k, r.S, r.H, threads, y);
}

void unpermute_rows_backward(const void* dy, int64_t dy_stride, const void* rows, int64_t rows_stride, DType dtype,
                             const int32_t* tokens, const int32_t* slots, const void* weights, int64_t T, int64_t k,
                             int64_t S, int64_t H, int64_t threads, void* drows, void* dweights) {
  check_range("tokens", tokens, S, "T", T);
  check_range("slots", slots, T * k, "S", S);
  const auto row_gradient = kernels().row_gradient;
  const int64_t size = size_of(dtype);
  const bool is_double = dtype == DType::f64;
  std::fill_n(static_cast<char*>(dweights), T * k * (is_double ? 8 : 4), 0);
  if (H == 0) return;
  advise_huge_pages(drows, S * H * size);
  const bool stream = S * H * size >= kStreamBytes;
  // By slot, not by token: every row of drows then has one writer, whatever the plan says.
  parallel_for_rows(S, 3 * H * size, threads, [&](int64_t s) {
    char* drow = static_cast<char*>(drows) + s * H * size;
    const int64_t t = tokens[s];
    double weight = 0;
    bool used = false;
    for (int64_t i = t * k; t >= 0 && i < (t + 1) * k; ++i) {
      if (slots[i] != s) continue;
      used = true;
      weight += is_double ? static_cast<const double*>(weights)[i] : static_cast<const float*>(weights)[i];
    }
    if (!used) return void(std::memset(drow, 0, H * size));
    const double dot = row_gradient({dtype, H, static_cast<const char*>(dy) + t * dy_stride * size,
                                     static_cast<const char*>(rows) + s * rows_stride * size, weight, drow, stream});
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      if (slots[i] != s) continue;
      if (is_double)
        static_cast<double*>(dweights)[i] = dot;
      else
        static_cast<float*>(dweights)[i] = float(dot);
    }
  });
}

}  // namespace moert::cpu
