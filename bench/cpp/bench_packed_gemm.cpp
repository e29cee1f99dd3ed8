// One thread's kernels for few rows: packed_gemm/<format>/<precision>/M:<rows>/cached:<1: from the caches, 0: memory>.
//
// GB/s are packed bytes, scales included, of the fastest tenth of many short samples, so that programs beside this one
// hardly count.  From the caches it is what the instructions take: the ALU floor.
#include "cpu/packed_experts.h"
#include "packed_weights.h"

namespace moert::bench {

namespace {

constexpr int64_t kColumns = 2048, kTile = 32, kMostRows = 16;

struct RowsOfX {
  cpu::Memory<char> quantized;
  cpu::Memory<float> floats;
  int64_t bytes = 0;

  RowsOfX(const Packing& packing, Precision precision) : floats(cpu::allocate<float>(kMostRows * kStride)) {
    const Bytes x = values(kMostRows * kStride, DType::f32, 1);
    std::memcpy(floats.get(), x.data(), x.size());
    if (precision == Precision::full) return;
    bytes = cpu::packed_gemm_kernels().quantized_row_bytes(packing, precision);
    quantized = cpu::allocate<char>(kMostRows * bytes);
    for (int64_t m = 0; m < kMostRows; ++m)
      cpu::packed_gemm_kernels().quantize_row(floats.get() + m * kStride, packing, precision,
                                              quantized.get() + m * bytes);
  }

  static constexpr int64_t kStride = kColumns + cpu::kFewPadding;
};

void packed_gemm(benchmark::State& state, const NamedFormat& format, Precision precision) {
  const int64_t M = state.range(0);
  const bool cached = state.range(1);
  const PackedWeights weights(format, cached ? 1 : 512, cached ? 128 : 512, kColumns);
  const RowsOfX x(weights.packing, precision);
  const auto scratch = cpu::allocate<char>(cpu::packed_scratch(kColumns));
  const auto c = cpu::allocate<float>(cpu::kTileRows * cpu::kTileColumns);
  std::vector<double> rates;
  int64_t e = 0;
  for (auto _ : state) {
    const double time = seconds([&] {
      for (int64_t repeat = 0; repeat < (cached ? 4 : 1); ++repeat)
        for (int64_t row = 0; row < weights.packing.rows; row += kTile) {
          const cpu::PackedRows b = cpu::rows_of(weights.matrix(), e, row);
          if (precision == Precision::full)
            cpu::packed_gemm_kernels().few(
                {M, kTile, x.floats.get(), RowsOfX::kStride, b, c.get(), reinterpret_cast<uint8_t*>(scratch.get())});
          else
            cpu::packed_gemm_kernels().gemm(
                {M, kTile, {x.quantized.get(), x.bytes}, b, precision, c.get(), scratch.get()});
        }
    });
    rates.push_back(double((cached ? 4 : 1) * weights.bytes_per_expert()) / time * 1e-9);
    e = (e + 1) % weights.E;
    state.SetIterationTime(time);
  }
  std::sort(rates.begin(), rates.end());
  state.counters["GB/s"] = rates[rates.size() * 9 / 10];
  state.counters["Gweights/s"] =
      rates[rates.size() * 9 / 10] * double(weights.packing.rows * kColumns) / double(weights.bytes_per_expert());
}

void add(const NamedFormat& format, Precision precision) {
  const std::string name = std::string("packed_gemm/") + format.name + "/" + moert::name(precision);
  auto* bench = benchmark::RegisterBenchmark(name.c_str(),
                                             [=, &format](benchmark::State& s) { packed_gemm(s, format, precision); });
  bench->UseManualTime()->Unit(benchmark::kMicrosecond)->ArgNames({"M", "cached"})->Iterations(1500);
  for (const int64_t M : {1, 2, 4, 8, 16})
    for (const int64_t cached : {1, 0})
      if (M <= cpu::kFewRows || precision != Precision::full) bench->Args({M, cached});
}

const bool registered = [] {
  for (const NamedFormat& format : kNamedFormats) {
    const Precision precision = default_precision(format.format, format.group, format.planes);
    if (precision != Precision::full) add(format, precision);
    if (int(format.format) >= kRowFormats) add(format, Precision::full);  // of others full rows meet tiles of float32
  }
  return true;
}();

}  // namespace
}  // namespace moert::bench
