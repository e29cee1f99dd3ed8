#include "moert/dispatch.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/dispatch_isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/permute_isa.h"
#include "moert/check.h"
#include "moert/isa.h"
#include "moert/permute.h"

namespace moert::cpu {

namespace {

const DispatchKernels& kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::dispatch_kernels;
  if (isa() >= Isa::avx2) return avx2::dispatch_kernels;
#endif
  return generic::dispatch_kernels;
}

void check_between(const char* name, const int32_t* values, int64_t count, int64_t end, const char* contract) {
  for (int64_t i = 0; i < count; ++i)
    MOERT_CHECK(0 <= values[i] && values[i] < end, name, " must hold ", contract, end, "), got ", values[i]);
}

void check_packing(const Packing& p) {
  for (int64_t r = 0; r < p.R; ++r)
    MOERT_CHECK(p.offsets[r] <= p.offsets[r + 1], "offsets must be in rising order, got ", p.offsets[r], " before ",
                p.offsets[r + 1]);
  MOERT_CHECK(p.offsets[0] == 0 && p.offsets[p.R] == p.N, "offsets must be from 0 to N=", p.N, ", got ", p.offsets[0],
              " to ", p.offsets[p.R]);
  check_between("tokens", p.tokens, p.N, p.T, "a token in [0, T=");
  check_between("local_ids", p.local_ids, p.E, kMostLocalExperts + 1, "an id in [0, ");
}

// The choices of one token that go to rank r.
void pack_choices(const Packing& p, int64_t token, int64_t r, char* weights, int16_t* ids) {
  const int32_t* id = p.ids + token * p.k;
  const char* weight = static_cast<const char*>(p.weights) + token * p.k * p.weight_size;
  for (int64_t j = 0; j < p.k; ++j) {
    const bool goes = id[j] >= 0 && id[j] < p.E && p.expert_to_rank[id[j]] == r;
    ids[j] = goes ? int16_t(p.local_ids[id[j]]) : int16_t(-1);
    if (goes)
      std::memcpy(weights + j * p.weight_size, weight + j * p.weight_size, p.weight_size);
    else
      std::memset(weights + j * p.weight_size, 0, p.weight_size);
  }
}

}  // namespace

void dispatch_plan(const int32_t* ids, int64_t T, int64_t k, const int32_t* expert_to_rank, int64_t E, int64_t R,
                   int64_t threads, int32_t* offsets, int32_t* tokens, int32_t* slots) {
  check_between("expert_to_rank", expert_to_rank, E, R, "a rank in [0, R=");
  std::vector<int32_t> ranks(T * k);  // [T, k]: where each choice goes, -1 where an earlier one goes there too
  const int64_t step = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, k));
  parallel_for((T + step - 1) / step, threads, [&](int64_t task) {
    for (int64_t t = task * step, end = std::min(T, t + step); t < end; ++t) {
      int32_t* to = ranks.data() + t * k;
      for (int64_t j = 0; j < k; ++j) {
        const int32_t id = ids[t * k + j], rank = id >= 0 && id < E ? expert_to_rank[id] : -1;
        to[j] = std::find(to, to + j, rank) == to + j ? rank : -1;
      }
    }
  });
  permute_plan(ranks.data(), T, k, R, -1, threads, offsets, tokens, slots);
}

void dispatch_pack(const Packing& p, int64_t threads, void* records) {
  check_packing(p);
  const int64_t size = size_of(p.dtype);
  const RecordLayout layout = record_layout(p.H, size, p.k, p.weight_size, p.payload);
  const int64_t row_bytes = p.payload == Payload::none ? p.H * size : scale_place(p.H) + 4;
  const auto round_row = kernels().round_row;
  advise_huge_pages(records, (p.last - p.first) * layout.bytes);
  parallel_for_rows(p.last - p.first, layout.bytes, threads, [&](int64_t i) {
    char* record = static_cast<char*>(records) + i * layout.bytes;
    const int64_t n = p.first + i, token = p.tokens[n];
    const int64_t r = std::upper_bound(p.offsets, p.offsets + p.R + 1, int32_t(n)) - p.offsets - 1;
    const char* row = static_cast<const char*>(p.x) + token * p.x_stride * size;
    if (p.payload != Payload::none)
      round_row(row, p.dtype, p.H, p.payload, record);
    else if (p.H > 0)  // rows without elements may have no address
      std::memcpy(record, row, row_bytes);
    std::memset(record + row_bytes, 0, layout.weights - row_bytes);
    auto* ids = reinterpret_cast<int16_t*>(record + layout.ids);
    pack_choices(p, token, r, record + layout.weights, ids);
    std::memset(ids + p.k, 0, layout.bytes - layout.ids - 2 * p.k);
  });
}

void dispatch_unpack(const Unpacking& u, int64_t threads, void* rows) {
  const int64_t row_bytes = u.H * size_of(u.dtype);
  const auto widen_row = kernels().widen_row;
  advise_huge_pages(rows, u.M * row_bytes);
  parallel_for_rows(u.M, row_bytes, threads, [&](int64_t i) {
    widen_row(static_cast<const char*>(u.records) + i * u.bytes, u.H, u.payload, u.dtype,
              static_cast<char*>(rows) + i * row_bytes);
  });
}

}  // namespace moert::cpu
