#include "cuda/gpu.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "cuda/launch.h"

namespace moert::cuda {

bool is_on(const char* name) {
  const char* value = std::getenv(name);
  const std::string wanted = value ? value : "";
  MOERT_CHECK(wanted.empty() || wanted == "0" || wanted == "1", name, " must be 0 or 1, got ", wanted);
  return wanted == "1";
}

void require_capability(int major, int minor, int device) {
  MOERT_CHECK(major >= 8, "the GPU must have compute capability >= 8.0, got ", major, ".", minor, " (device ", device,
              ")");
}

#if defined(__CUDACC__)

namespace {

constexpr int kDevices = 64;  // beyond them nothing is remembered

int current_device() {
  int device = 0;
  MOERT_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  MOERT_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

void require_device() {
  static std::atomic<bool> good[kDevices];
  const int device = current_device();
  if (device < kDevices && good[device].load(std::memory_order_relaxed)) return;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  require_capability(major, minor, device);
  if (device < kDevices) good[device].store(true, std::memory_order_relaxed);
}

bool is_sm90() { return attribute(cudaDevAttrComputeCapabilityMajor, current_device()) == 9; }

int num_sms() {
  static std::atomic<int> known[kDevices];
  const int device = current_device();
  if (device >= kDevices) return attribute(cudaDevAttrMultiProcessorCount, device);
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    count = attribute(cudaDevAttrMultiProcessorCount, device);
    known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

#else

void require_device() {}

bool is_sm90() { return true; }

int num_sms() { return 4; }

#endif

}  // namespace moert::cuda
