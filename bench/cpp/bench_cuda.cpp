// Grouped products and expert FFNs on a GPU: random data, uniform routing, the median of the times of `kRuns` runs.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "moert/fused_experts.h"

using namespace moert;

namespace {

constexpr int kWarm = 3, kRuns = 20;

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void* allocate(int64_t bytes) {
  void* data = nullptr;
  must(cudaMalloc(&data, size_t(std::max<int64_t>(bytes, 1))));
  return data;
}

uint32_t next() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

// Bfloat16 numbers in [-1, 1) times `scale`: zeros would run at a higher clock.
void* random_values(int64_t n, float scale) {
  std::vector<bf16> values(std::min<int64_t>(n, 1 << 20));
  for (bf16& x : values) x = to_bf16((float(next() >> 8) * 0x1p-23f - 1) * scale);
  auto* data = static_cast<char*>(allocate(n * 2));
  for (int64_t i = 0; i < n; i += int64_t(values.size()))
    must(cudaMemcpy(data + i * 2, values.data(), size_t(std::min(n - i, int64_t(values.size()))) * 2,
                    cudaMemcpyHostToDevice));
  return data;
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  auto* data = static_cast<T*>(allocate(int64_t(values.size() * sizeof(T))));
  must(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

template <typename F>
void time(const char* what, double flop, const F& run) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kWarm + kRuns; ++i) {
    must(cudaEventRecord(begin));
    run();
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarm) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  std::printf("  %-32s %9.3f ms %8.1f TFLOP/s\n", what, ms, flop / ms * 1e-9);
}

struct Shape {
  const char* name;
  int64_t T, H, I, E, k;
};

constexpr Shape kShapes[] = {{"Mixtral-8x7B", 8192, 4096, 14336, 8, 2},
                             {"Qwen3-30B-A3B", 8192, 2048, 768, 128, 8},
                             {"SonicMoE 4096, I 256", 32768, 4096, 256, 256, 16},
                             {"SonicMoE 4096, I 2048", 32768, 4096, 2048, 64, 4},
                             {"Qwen3-30B-A3B, 64 tokens", 64, 2048, 768, 128, 8}};

void bench(const Shape& s) {
  std::printf("%s: T=%ld H=%ld I=%ld E=%ld k=%ld\n", s.name, long(s.T), long(s.H), long(s.I), long(s.E), long(s.k));
  const int64_t S = s.T * s.k;
  std::vector<int32_t> ids, offsets{0};
  std::vector<float> weights(S, 1.0f / float(s.k));
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t j = 0, first = next() >> 8; j < s.k; ++j) ids.push_back(int32_t((first + j * 37) % s.E));
  for (int64_t e = 0; e < s.E; ++e)
    offsets.push_back(offsets.back() + int32_t(std::count(ids.begin(), ids.end(), int32_t(e))));
  void *x = random_values(s.T * s.H, 1), *rows = random_values(S * s.H, 1), *mid = random_values(S * 2 * s.I, 1);
  void* w1 = random_values(s.E * 2 * s.I * s.H, 1 / std::sqrt(float(s.H)));
  void* w2 = random_values(s.E * s.H * s.I, 1 / std::sqrt(float(s.I)));
  int32_t *device_ids = on_device(ids), *device_offsets = on_device(offsets);
  float* device_weights = on_device(weights);

  GroupedGemm p{};
  p.S = S, p.E = s.E, p.N = 2 * s.I, p.K = s.H, p.offsets = device_offsets;
  p.x = {rows, DType::bf16, s.H};
  p.w = {w1, DType::bf16, 2 * s.I * s.H, s.H, 1};
  const double flop = 2.0 * double(S) * double(2 * s.I) * double(s.H);
  time("grouped_gemm, mma.sync", flop, [&] { cuda::grouped_gemm(p, nullptr, mid, 2 * s.I); });
  if (const int64_t bytes = cuda::grouped_gemm_workspace(s.E)) {
    p.workspace = allocate(bytes);
    time("grouped_gemm, pointer arrays", flop, [&] { cuda::grouped_gemm(p, nullptr, mid, 2 * s.I); });
    must(cudaFree(p.workspace));
    p.workspace = nullptr;
  }
  setenv("MOERT_PERSISTENT_GEMM", "1", 1);  // on Hopper; on others the same again
  time("grouped_gemm, persistent", flop, [&] { cuda::grouped_gemm(p, nullptr, mid, 2 * s.I); });
  setenv("MOERT_PERSISTENT_GEMM", "0", 1);
  const GroupedGemmWgrad wgrad{S, s.E, 2 * s.I, s.H, device_offsets, {mid, DType::bf16, 2 * s.I}, p.x};
  void* dw = allocate(s.E * 2 * s.I * s.H * 2);
  time("grouped_gemm_wgrad", flop,
       [&] { cuda::grouped_gemm_wgrad(wgrad, nullptr, {dw, DType::bf16, 2 * s.I * s.H, s.H, 1}); });

  GroupedGemmWgrad added = wgrad;
  added.accumulate = true;
  void* sums = allocate(s.E * 2 * s.I * s.H * 4);
  time("grouped_gemm_wgrad, added", flop,
       [&] { cuda::grouped_gemm_wgrad(added, nullptr, {sums, DType::f32, 2 * s.I * s.H, s.H, 1}); });

  ExpertWeights experts{};
  experts.E = s.E, experts.H = s.H, experts.I = s.I;
  experts.gate = {w1, DType::bf16, 2 * s.I * s.H, s.H, 1};
  experts.up = {static_cast<bf16*>(w1) + s.I * s.H, DType::bf16, 2 * s.I * s.H, s.H, 1};
  experts.down = {w2, DType::bf16, s.H * s.I, s.I, 1};
  const RoutedRows tokens{s.T, s.k, {x, DType::bf16, s.H}, device_ids, device_weights};
  void *workspace = allocate(cuda::fused_experts_workspace(tokens, experts, false)), *y = allocate(s.T * s.H * 2);
  for (const char* persistent : {"0", "1"}) {
    setenv("MOERT_PERSISTENT_GEMM", persistent, 1);
    time(*persistent == '1' ? "fused_experts, persistent" : "fused_experts", 1.5 * flop,
         [&] { cuda::fused_experts(tokens, experts, workspace, nullptr, y, nullptr); });
  }
  setenv("MOERT_PERSISTENT_GEMM", "0", 1);
  must(cudaFree(workspace));

  ExpertGradients gradients{};
  gradients.dx = y, gradients.dweights = sums;
  void* ddown = allocate(s.E * s.H * s.I * 2);
  gradients.dgate = experts.gate, gradients.dup = experts.up, gradients.ddown = experts.down;
  gradients.dgate.data = dw, gradients.dup.data = static_cast<bf16*>(dw) + s.I * s.H, gradients.ddown.data = ddown;
  workspace = allocate(cuda::fused_experts_backward_workspace(tokens, experts, true, gradients));
  time("fused_experts_backward", 3 * flop, [&] {
    cuda::fused_experts_backward({x, DType::bf16, s.H}, tokens, experts, mid, workspace, nullptr, gradients);
  });
  for (void* data : {x, rows, mid, w1, w2, dw, sums, ddown, workspace, y, static_cast<void*>(device_ids),
                     static_cast<void*>(device_offsets), static_cast<void*>(device_weights)})
    must(cudaFree(data));
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "needs a CUDA device, found none\n");
    return 77;
  }
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors, bfloat16\n", device.name, device.multiProcessorCount);
  for (const Shape& shape : kShapes) bench(shape);
}
