// dw[e] (+)= left^T right over the slots of e, as tiles of the whole dw.  A is the type of values.
#pragma once

#include "cpu/parallel.h"
#include "cpu/tile_tasks.h"
#include "moert/grouped_gemm.h"

namespace moert::cpu {

template <typename A>
class WeightGradient {
 public:
  // Nothing where dw.data is null.
  WeightGradient(const GroupedGemmWgrad& p, const ExpertMatrix& dw)
      : dw_(dw), offsets_(p.offsets), accumulate_(p.accumulate) {
    // The side of dw whose elements lie side by side becomes the columns of the tiles.
    const bool swap = dw.col_stride > dw.row_stride;
    if (swap) std::swap(dw_.row_stride, dw_.col_stride);
    left_ = swap ? p.x : p.dy;
    right_ = swap ? p.dy : p.x;
    M_ = swap ? p.K : p.N;
    N_ = swap ? p.N : p.K;
    stream_ = !accumulate_ && p.E * M_ * N_ * size_of(dw.dtype) >= kStreamBytes;
    if (!dw.data || M_ == 0 || N_ == 0) return;
    if (dw.expert_stride > 0 && !accumulate_)
      advise_huge_pages(const_cast<void*>(dw.data), size_t((p.E - 1) * dw.expert_stride * size_of(dw.dtype)));
    experts_ = busiest_first(p.offsets, p.E);
    for (int64_t e = 0; e < p.E && !accumulate_; ++e)  // zeros
      if (p.offsets[e] == p.offsets[e + 1]) experts_.push_back(e);
    tiles_m_ = (M_ + kTileRows - 1) / kTileRows;
    tiles_n_ = (N_ + kTileColumns - 1) / kTileColumns;
  }

  void run(Team& team) const {
    team.for_each(int64_t(experts_.size()) * tiles_m_ * tiles_n_, [&](int64_t i) {
      const int64_t e = experts_[i / (tiles_m_ * tiles_n_)];
      // Tiles of equal height.
      const int64_t tile = i / tiles_n_ % tiles_m_, m = M_ * tile / tiles_m_, M = M_ * (tile + 1) / tiles_m_ - m;
      const int64_t n = i % tiles_n_ * kTileColumns;
      multiply(e, m, M, n, std::min(kTileColumns, N_ - n));
    });
  }

 private:
  void multiply(int64_t e, int64_t m, int64_t M, int64_t n, int64_t N) const {
    const TileMemory<A> memory = tile_memory<A>();
    const int64_t begin = offsets_[e], slots = offsets_[e + 1] - begin;
    const int64_t skip = e * dw_.expert_stride + m * dw_.row_stride + n * dw_.col_stride;
    StoreTile out{M,
                  N,
                  memory.c0,
                  nullptr,
                  nullptr,
                  ScaleOn::output,
                  const_cast<char*>(at(dw_.data, dw_.dtype, skip)),
                  dw_.dtype,
                  dw_.row_stride,
                  dw_.col_stride};
    out.stream = stream_;
    out.accumulate = accumulate_;
    GemmTile tile{
        M, N, slots, operand_of(left_, begin, m, true), operand_of(right_, begin, n, true), memory.c0, memory.scratch};
    tile.finish = &out;
    gemm_kernels().gemm(tile);
  }

  ExpertMatrix dw_;
  const int32_t* offsets_;
  Rows left_, right_;
  int64_t M_, N_, tiles_m_ = 0, tiles_n_ = 0;
  bool accumulate_, stream_;
  std::vector<int64_t> experts_;
};

}  // namespace moert::cpu
