#include "moert/gating.h"

#include <algorithm>
#include <memory>

#include "cpu/gating_isa.h"
#include "cpu/parallel.h"
#include "moert/check.h"
#include "moert/isa.h"

namespace moert::cpu {

namespace {

const GatingKernels& kernels(DType dtype) {
  if (dtype == DType::f64) return generic::gating_kernels_f64;
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::gating_kernels;
  if (isa() >= Isa::avx2) return avx2::gating_kernels;
#endif
  return generic::gating_kernels;
}

void run(GatingKernel kernel, const GatingCall& call, int64_t threads) {
  // Below some 10,000 logits waking another thread costs more than it saves.
  const int64_t tasks = std::clamp<int64_t>(call.T * (call.E + 8 * call.k) / 16384, 1, std::max<int64_t>(threads, 1));
  const int64_t tokens = (call.T + 16 * tasks - 1) / (16 * tasks) * 16;
  const int64_t size = 64 * gating_scratch_rows(call.E, call.k, call.options->num_groups);
  // Allocated here: an exception must not leave a parallel region.
  const std::unique_ptr<char[]> memory(new char[tasks * size + 64]);
  char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
  parallel_for(tasks, threads, [&](int64_t task) {
    kernel(call, std::min(task * tokens, call.T), std::min((task + 1) * tokens, call.T), scratch + task * size);
  });
}

}  // namespace

void topk_gating(const void* logits, DType dtype, int64_t stride, const void* bias, int64_t T, int64_t E, int64_t k,
                 const GatingOptions& options, int64_t threads, void* weights, int32_t* ids) {
  MOERT_CHECK(0 <= k && k <= options.topk_groups * (E / options.num_groups), "k must be in [0, ",
              options.topk_groups * (E / options.num_groups), "], got ", k);
  if (T == 0 || k == 0) return;
  run(kernels(dtype).forward, {logits, dtype, stride, bias, T, E, k, &options, weights, ids, nullptr}, threads);
}

void topk_gating_backward(const void* dweights, const void* logits, DType dtype, int64_t stride, const int32_t* ids,
                          int64_t T, int64_t E, int64_t k, const GatingOptions& options, int64_t threads,
                          void* dlogits) {
  if (T == 0 || E == 0) return;
  run(kernels(dtype).backward,
      {logits, dtype, stride, nullptr, T, E, k, &options, const_cast<void*>(dweights), const_cast<int32_t*>(ids),
       dlogits},
      threads);
}

}  // namespace moert::cpu
