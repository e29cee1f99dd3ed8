// The words of hopper.h on the host, as the PTX manual has them.
#pragma once

#include <deque>
#include <vector>

#include "cuda/emulate_tensor_core.h"

namespace moert::cuda {

using TensorMap = TensorBoxes;

inline TensorMap tensor_map(const TensorBoxes& t) { return t; }

struct Barrier {
  int64_t phases;  // that have ended
  int64_t bytes;   // expected and not there yet
  int32_t arrivals, missing, waiting;
};

// Boxes on their way.  Like other copies they arrive when they are asked for or as late as they may, which is when a
// thread waits for them.
struct BoxCopy {
  TensorMap map;
  Barrier* barrier;
  char* to;
  int32_t at[5];
  static inline std::vector<BoxCopy> pending;

  void arrive() const {
    uint32_t place[5] = {};
    int64_t bytes = 0;
    for (bool more = true; more; bytes += 2) {
      const char* from = static_cast<const char*>(map.data);
      bool inside = true;
      for (int d = 0; d < map.rank; ++d) {
        const int64_t i = int64_t(at[d]) + place[d];
        inside = inside && i >= 0 && i < int64_t(map.sizes[d]);
        from += i * int64_t(d ? map.strides[d - 1] : 2);
      }
      char* here = to + (bytes ^ (bytes >> 7 & 7) << 4);
      if (inside)
        std::memcpy(here, from, 2);
      else
        std::memset(here, 0, 2);
      more = false;
      for (int d = 0; d < map.rank && !more; ++d) {
        more = ++place[d] < map.box[d];
        if (!more) place[d] = 0;
      }
    }
    barrier->bytes -= bytes;
  }
};

inline void end_phase(Barrier& b) {
  if (b.missing || b.bytes) return;
  ++b.phases;
  b.missing = b.arrivals;
}

inline void init(Barrier& b, int arrivals) {
  if (!BoxCopy::pending.empty()) emulate::fail("a box must be waited for");
  b = {0, 0, arrivals, arrivals, 0};
}

inline uintptr_t shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

inline void publish_barriers() {}
inline void publish_writes() {}

inline int cluster_rank() { return int(emulate::block_in_cluster()); }
inline void sync_cluster() { emulate::sync_cluster(); }

inline void arrive(Barrier& b) {
  if (b.missing == 0) emulate::fail("a barrier must be reached by as many threads as it was made for, got one more");
  --b.missing;
  end_phase(b);
}

inline void arrive_at(Barrier& b, int block) { arrive(*static_cast<Barrier*>(emulate::in_block(&b, unsigned(block)))); }

inline void arrive_expecting(Barrier& b, uint32_t bytes) {
  b.bytes += bytes;
  arrive(b);
}

inline void deliver(Barrier& b) {
  auto& pending = BoxCopy::pending;
  for (size_t i = 0; i < pending.size();) {
    if (pending[i].barrier != &b) {
      ++i;
      continue;
    }
    pending[i].arrive();
    pending.erase(pending.begin() + int64_t(i));
    end_phase(b);
  }
}

inline void wait(Barrier& b, uint32_t parity) {
  while (uint32_t(b.phases % 2) == parity) {
    const int64_t passed = b.phases;
    deliver(b);
    if (b.phases > passed) continue;
    ++b.waiting;
    emulate::wait(b.phases, passed);
    --b.waiting;
  }
}

template <class... Coordinates>
void copy_box(const TensorMap& map, Barrier& b, void* to, Coordinates... at) {
  if (int(sizeof...(at)) != map.rank) emulate::fail("a box must have a coordinate for every dimension of its tensor");
  if (reinterpret_cast<uintptr_t>(to) % kSliceAlign) emulate::fail("a slice must be aligned to 1024 bytes");
  if (map.box[0] * 2 != 128) emulate::fail("the rows of a slice must have 128 bytes");
  BoxCopy::pending.push_back({map, &b, static_cast<char*>(to), {at...}});
  if (emulate::copies_at_once || b.waiting) deliver(b);
}

template <class... Coordinates>
void copy_box_to_all(const TensorMap& map, int blocks, Barrier& b, void* to, Coordinates... at) {
  for (int block = 0; block < blocks; ++block)
    copy_box(map, *static_cast<Barrier*>(emulate::in_block(&b, unsigned(block))),
             emulate::in_block(to, unsigned(block)), at...);
}

template <int n>
void take_registers() {}
template <int n>
void give_registers() {}

// Reads a stage as soon as it may, which finds a copy that nobody waited for, or, where copies arrive at once, as late
// as it may, which finds one that comes too soon.  The lanes of a warp begin and wait together.
template <class Element, int n, int kStages, bool kMajorA, bool kMajorB, int kGroups>
class SlicePair {
  static constexpr int kSums = n / kGroups, kOf64 = n / 2;  // of all its rows of a, of 64
  struct Started {
    int stage;
    bool first;
  };
  const Element *a_, *b_;
  int group_;
  float c_[kSums];
  std::deque<Started> started_;

  template <bool kMajor>
  static float element(const Element* slice, int row, int k) {
    if constexpr (kMajor) return float(slice[piece_place(row, k / kPiece) + k % kPiece]);
    const int inside = row % kSliceK;
    return float(slice[(row - inside) * kSliceK + piece_place(k, inside / kPiece) + inside % kPiece]);
  }

  void multiply(const Started& s) {
    const Element *a = a_ + s.stage * 128 * kSliceK, *b = b_ + s.stage * n * kSliceK;
    const int t = int(threadIdx.x) % kWarpgroup;
    for (int i = 0; i < kSums; ++i) {
      if (s.first) c_[i] = 0;
      const int row = 64 * (group_ + i / kOf64) + sum_row(t, i % kOf64), column = sum_column(t, i % kOf64);
      for (int k = 0; k < kSliceK; ++k) c_[i] += element<kMajorA>(a, row, k) * element<kMajorB>(b, column, k);
    }
  }

  void multiply_all_but(size_t newest) {
    for (; started_.size() > newest; started_.pop_front()) multiply(started_.front());
  }

 public:
  SlicePair(const Element* a, const Element* b, int group) : a_(a), b_(b), group_(group) {}

  void start(int stage, bool first) {
    __syncwarp();
    started_.push_back({stage, first});
    if (!emulate::copies_at_once) multiply_all_but(0);
  }

  template <int newest>
  void finish() {
    multiply_all_but(newest);
    __syncwarp();
  }

  float sum(int i) const { return c_[i]; }
};

}  // namespace moert::cuda
