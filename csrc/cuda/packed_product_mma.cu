// Every kernel over packed weights and tensor cores that there is: five decoders, two elements, two shapes.
#include "cuda/packed_product_mma.cuh"

#include "cuda/launch.h"

namespace moert::cuda {

namespace {

// Blocks of a GPU's multiprocessors, four on each: fewer are made smaller, so that all have some.
constexpr int64_t kManyBlocks = 4 * 132;

template <class Codes, typename T, class Shape>
void start(PackedProduct<float> p, [[maybe_unused]] void* stream) {
  p.tile_rows(Shape::kTokens);
  const int rows = 16 * Shape::kTiles, outputs = p.gated() ? rows / 2 : rows;
  const auto blocks_of = [&](int warps) { return p.tiles * ceil_div(p.written, warps * outputs); };
  const int warps = Shape::kTokens == 8 && blocks_of(kMmaWarps) < kManyBlocks ? kMmaWarps / 2 : kMmaWarps;
  const int64_t blocks = blocks_of(warps);
  const int shared = packed_mma_shared<Codes, Shape>(warps);
  MOERT_CHECK(blocks <= 0x7fffffff, "a grouped product must have at most 2^31 - 1 tiles, got ", blocks);
  const auto kernel = &packed_product_mma<Codes, T, Shape>;
#if defined(__CUDACC__)
  MOERT_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<unsigned(blocks), warps * kWarp, shared, static_cast<cudaStream_t>(stream)>>>(p);
  MOERT_CUDA_CHECK(cudaGetLastError());
#else
  emulate::run({unsigned(blocks), 1, 1}, unsigned(warps * kWarp), size_t(shared), [&] { kernel(p); });
#endif
}

}  // namespace

template <typename T>
void multiply_on_tensor_cores(const PackedProduct<float>& p, void* stream) {
  // The host does not know how many rows an expert has: as many as all have on average.
  const bool few = p.S <= int64_t(p.E) * NarrowTile::kTokens;
  const auto with = [&](auto codes) {
    using Codes = decltype(codes);
    few ? start<Codes, T, NarrowTile>(p, stream) : start<Codes, T, WideTile>(p, stream);
  };
  switch (p.w.matrix.packing.format) {
    case Format::int8:
      return with(Int8Fragments{});
    case Format::int4:
    case Format::int4_asymmetric:
      return with(Int4Fragments{});
    case Format::mxfp4:
      return with(Mxfp4Fragments{});
    case Format::ternary2:
      return with(Ternary2Fragments{});
    case Format::fp8:
      return with(Fp8Fragments{});
    default:
      MOERT_CHECK(false, "packed weights must have a format that tensor cores take, got ",
                  cpu::name(p.w.matrix.packing.format));
  }
}

template void multiply_on_tensor_cores<bf16>(const PackedProduct<float>&, void*);
template void multiply_on_tensor_cores<f16>(const PackedProduct<float>&, void*);

}  // namespace moert::cuda
