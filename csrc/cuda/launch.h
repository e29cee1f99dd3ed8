// How a kernel is started: on the current device, in a stream, every error an exception.
#pragma once

#include "cuda/simt.h"
#include "moert/check.h"

#if defined(__CUDACC__)
#define MOERT_CUDA_CHECK(call)                                                                   \
  do {                                                                                           \
    const cudaError_t moert_error = (call);                                                      \
    if (moert_error != cudaSuccess) cudaGetLastError(); /* which the next launch would report */ \
    MOERT_CHECK(moert_error == cudaSuccess, #call " failed: ", cudaGetErrorString(moert_error)); \
  } while (0)
#endif

namespace moert::cuda {

MOERT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  int64_t x, y = 1;
  int64_t shared = 0;  // bytes of MOERT_SHARED, at most 48 KiB
};

// kernel(arguments...) in grid.x * grid.y blocks; nothing where there are none.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, [[maybe_unused]] void* stream,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  MOERT_CHECK(grid.x <= 0x7fffffff && grid.y <= 0xffff, "a grid must have at most 2^31 - 1 by 65535 blocks, got ",
              grid.x, " by ", grid.y);
  MOERT_CHECK(grid.shared <= 48 * 1024, "a block must have at most 48 KiB of MOERT_SHARED, got ", grid.shared);
#if defined(__CUDACC__)
  const dim3 blocks(unsigned(grid.x), unsigned(grid.y));
  kernel<<<blocks, threads, size_t(grid.shared), static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  const cudaError_t error = cudaGetLastError();
  MOERT_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
#else
  emulate::run({unsigned(grid.x), unsigned(grid.y), 1}, unsigned(threads), size_t(grid.shared),
               [&] { kernel(Parameters(arguments)...); });
#endif
}

}  // namespace moert::cuda
