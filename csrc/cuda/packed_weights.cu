#include "cuda/packed_weights.h"

#include <array>
#include <mutex>

#include "cuda/launch.h"

namespace moert::cuda {

const Sub1Entry* sub1_on_device() {
#if defined(__CUDACC__)
  constexpr int kMostDevices = 64;
  static std::array<Sub1Entry*, kMostDevices> tables{};
  static std::mutex mutex;
  int device = 0;
  MOERT_CUDA_CHECK(cudaGetDevice(&device));
  MOERT_CHECK(device < kMostDevices, "x must be on one of the first ", kMostDevices, " GPUs, got number ", device);
  const std::lock_guard lock(mutex);
  Sub1Entry*& table = tables[size_t(device)];
  if (!table) {
    const auto& entries = cpu::sub1_dictionary().entries;
    Sub1Entry* made = nullptr;
    const size_t bytes = entries.size() * sizeof(Sub1Entry);
    MOERT_CUDA_CHECK(cudaMalloc(&made, bytes));
    // cudaMemcpy may return before the bytes are there; the kernels of any stream may follow.
    cudaError_t status = cudaMemcpy(made, entries.data(), bytes, cudaMemcpyHostToDevice);
    if (status == cudaSuccess) status = cudaStreamSynchronize(cudaStreamLegacy);
    if (status != cudaSuccess) cudaFree(made);
    MOERT_CUDA_CHECK(status);
    table = made;
  }
  return table;
#else
  return cpu::sub1_dictionary().entries.data();
#endif
}

int width_of(Format format) {
  return with_codes(format, [](auto codes) { return decltype(codes)::kColumns; });
}

PackedWeights weights_of(const char* name, const PackedMatrix& matrix) {
  const Packing& p = matrix.packing;
  PackedWeights w{matrix, 0, 0, 0, 31, false, nullptr};  // 2^31: a whole row
  if (p.format == Format::sub1) return w;
  MOERT_CHECK(p.rows * groups(p) <= INT32_MAX && p.columns <= INT32_MAX / 2, name,
              " must have fewer than 2^31 scales an expert and 2^30 columns on a GPU, got ", p.rows, " rows of ",
              groups(p), " and ", p.columns);
  w.row_bytes = row_bytes(p), w.groups = int32_t(groups(p));
  w.chunks = int32_t(ceil_div(p.columns, width_of(p.format)));
  if (p.group) w.group_shift = __builtin_ctzll(uint64_t(p.group));
  w.aligned = is_aligned(matrix.codes, matrix.codes_stride);
  return w;
}

}  // namespace moert::cuda
