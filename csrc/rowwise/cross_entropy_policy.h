// Which kernel takes a call of cross entropy on the GPU, and how it is launched: a pure function of the problem and the
// device. Host C++, no CUDA, so that it is tested without a GPU. The kernels never decide, this never computes.
//
//   logits' class stride 1, per row (V = 16-byte vectors of the row):
//     C <= 32             tiles of rows through shared memory, where rows have no gaps between them: 32 rows with a
//                         lane each up to C = 24, else 16, 8, 4 rows with 2, 4, 8 lanes; where rows are not whole
//                         vectors up to C = 192
//     V <= 256            warp rows: 1 to 32 lanes per row, 4 or 8 vectors each
//     V <= 4096           a block per row: up to 256 threads, 8 or 16 vectors each (16-bit types: 12, V <= 3072;
//                         general: 4, V <= 1024)
//     V <= 65536, sm_90+  a cluster per row: 2, 4, 8 or 16 such blocks (16-bit types: V <= 49152; general: V <= 16384;
//                         float64, of 8 blocks at most: V <= 8192),
//                         as many and with as many vectors per thread as cluster_cost likes best
//     beyond, and forward alone instead of a cluster where there are rows enough
//                         streaming: blocks (few rows, sm_90+: clusters) walk along the row
//     backward alone      needs no statistics: parts of a row are independent blocks, whatever its length
//   C <= 24, inner axis contiguous and 4-byte aligned
//                         columns: a thread has 4 bytes of every class
//   otherwise             planes: 32 lanes along the inner axis (8 bytes each where everything is aligned, else one
//                         element), warps along the classes
//
// General instantiations serve what is rare: float64, probability targets, label smoothing, softcap and
// logit_scale, row maps, margins, argmax and accuracy, rows on two axes that cannot be walked as one, gradients laid
// out differently from the logits.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../common/device_properties.h"
#include "../common/types.h"

namespace fastloss {

enum class Pass : int32_t { forward = 0, forward_grad = 1, backward = 2, any = 3 /* known at run time only */ };

constexpr int kWarpRowThreads = 128;  // threads of a block of warp rows
// How many of these blocks a multiprocessor is to hold; a launch has no more, each takes several rows.
constexpr int warp_row_blocks(bool general, int vectors) { return general ? 3 : vectors == 8 ? 5 : 7; }
constexpr int kTileBlocks = 5;    // the same of tiles, of kWarpRowThreads each
constexpr int kTileClasses = 24;  // classes that one thread of a tile holds
constexpr int kColumnThreads = 128;
constexpr int column_blocks(size_t element_bytes) { return element_bytes == 2 ? 4 : 5; }
constexpr int kFewColumnClasses = 8, kMaxColumnClasses = 24;  // two sizes
constexpr int kMaxTotals = 128;      // partial sums that the totals kernel leaves at most, a multiple of 32
constexpr int kMaxRowThreads = 256;  // at most, of a block that has a row or a part of one
constexpr int kMaxPlaneGroups = 8;   // warps of a plane block
constexpr int kPlaneClasses = 20;    // classes that one thread of a plane block holds

struct RowwiseProblem {
  int64_t outer = 0, classes = 0, inner = 1;
  int element_bytes = 4;
  Strides logits, grad;
  bool has_grad = false;
  int logits_offset = 0, grad_offset = 0;  // of the first element from a 16-byte boundary, in bytes
  bool in_place = false;                   // the gradient takes the logits' memory
  bool general = false;                    // wants what only the general instantiation has
  Pass pass = Pass::forward;

  int64_t rows() const { return outer * inner; }
};

enum class Regime : int32_t { warp_rows, block_rows, streaming_rows, tile, column, plane };

struct RowwiseConfig {
  Regime regime = Regime::warp_rows;
  bool general = false;
  bool wide = false;     // plane: 8 bytes per lane
  int vectors = 4;       // rows: 16-byte vectors per thread; columns: classes that a thread has room for
  int lanes = 32;        // warp rows, tiles: threads per row
  int parts = 1;         // block and streaming rows: blocks per row
  bool cluster = false;  // the parts form a cluster
  int64_t slice = 0;     // rows: vectors per part
  int groups = 1;        // plane: warps per block
  int threads = 32;
  int64_t grid = 0;
};

// What the policy takes for the best until a measurement says otherwise. Benchmarks try other values.
struct RowwiseTuning {
  int rows_to_stream = 4;  // per multiprocessor: from there on, forward alone needs no clusters
  int row_blocks = 32;     // of block, cluster and streaming rows per multiprocessor, at most; each takes several rows
  int few_vectors = 0;     // 1: few vectors per thread wherever a cluster can hold the row so, whatever the cost
};

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [outer, classes, inner] tensors whose outer and inner axes can be walked as one; then inner becomes 1. Transposed
// matrices (inner 1, classes not adjacent) become planes instead.
inline void merge_axes(int64_t* outer, int64_t classes, int64_t* inner, Strides* tensors[], int count) {
  for (int i = 0; i < count; ++i)
    if (classes == 1) tensors[i]->cls = 1;
  bool mergeable = true;
  for (int i = 0; i < count; ++i)
    mergeable &= *outer <= 1 || *inner <= 1 || tensors[i]->outer == *inner * tensors[i]->inner;
  if (mergeable && *inner > 1) {
    for (int i = 0; i < count; ++i) tensors[i]->outer = tensors[i]->inner;
    *outer *= *inner;
    *inner = 1;
  }
  if (*inner == 1 && tensors[0]->cls != 1) {
    for (int i = 0; i < count; ++i) tensors[i]->inner = tensors[i]->outer;
    *inner = *outer;
    *outer = 1;
  }
  for (int i = 0; i < count; ++i) {
    if (*outer == 1) tensors[i]->outer = 0;
    if (*inner == 1) tensors[i]->inner = 0;
  }
}

// Vectors of a part of a row: parts start on 128-byte lines of an aligned row.
inline int64_t row_slice(int64_t vectors, int parts) { return div_up(div_up(vectors, parts), 8) * 8; }

inline int row_threads(int64_t slice, int per_thread) {
  const int64_t needed = div_up(div_up(slice, per_thread), 32) * 32;
  return static_cast<int>(needed < kMaxRowThreads ? needed : kMaxRowThreads);
}
// What a row in a cluster costs a multiprocessor beside its bytes, in microseconds: the blocks wait for each other, and
// meanwhile only other blocks of the multiprocessor move data. The wait is that of an H100, fitted to kernel times; see
// "Clusters" in docs/tuning.md.
inline double cluster_cost(int64_t slice, int parts, int per_thread, bool general) {
  const int warps = !general && per_thread == 8 ? 25 : 16;  // of 80 and of 128 registers a thread
  return (1.2 + 0.14 * parts) * parts / (warps / (row_threads(slice, per_thread) / 32));
}

inline RowwiseConfig rowwise_config(const RowwiseProblem& p, const DeviceProperties& device,
                                    const RowwiseTuning& tuning = {}) {
  RowwiseConfig c;
  const int lanes16 = 16 / p.element_bytes;
  const int64_t rows = p.rows();
  // Do the parts of a row wait for each other? In backward alone only for the picked logit, should it be overwritten.
  const bool together = p.pass != Pass::backward || p.in_place;
  auto on_grid = [&](int64_t elements) { return elements * p.element_bytes % 16 == 0; };

  auto of_words = [&](const Strides& s, int offset) {
    return s.inner == 1 && offset % 4 == 0 && s.cls * p.element_bytes % 4 == 0 && s.outer * p.element_bytes % 4 == 0;
  };
  if (p.logits.cls != 1 && !p.general && p.classes <= kMaxColumnClasses && p.inner * p.element_bytes % 4 == 0 &&
      rows <= INT32_MAX && of_words(p.logits, p.logits_offset) && (!p.has_grad || of_words(p.grad, p.grad_offset))) {
    c.regime = Regime::column;
    c.vectors = p.classes <= kFewColumnClasses ? kFewColumnClasses : kMaxColumnClasses;
    c.threads = kColumnThreads;
    const int64_t blocks = div_up(rows * p.element_bytes / 4, kColumnThreads);
    const int64_t most = int64_t(device.multiprocessors) * column_blocks(p.element_bytes);
    c.grid = blocks < most ? blocks : most;
    return c;
  }
  if (p.logits.cls != 1) {
    c.regime = Regime::plane;
    auto on_grid8 = [&](const Strides& s, int offset) {
      return s.inner == 1 && offset % 8 == 0 && s.cls * p.element_bytes % 8 == 0 && s.outer * p.element_bytes % 8 == 0;
    };
    const int lanes8 = 8 / p.element_bytes;
    c.wide = lanes8 > 1 && p.inner % lanes8 == 0 && on_grid8(p.logits, p.logits_offset) &&
             (!p.has_grad || on_grid8(p.grad, p.grad_offset));
    c.general = p.general;
    const int64_t groups = div_up(p.classes, kPlaneClasses);
    c.groups = static_cast<int>(groups < 1 ? 1 : groups <= kMaxPlaneGroups ? groups : kMaxPlaneGroups);
    c.threads = 32 * c.groups;
    const int64_t tiles = p.outer * div_up(p.inner, 32 * (c.wide ? lanes8 : 1));
    const int64_t most = int64_t(device.multiprocessors) * 64;
    c.grid = tiles < most ? tiles : most;
    return c;
  }

  // Gradients that do not lie on the 16-byte grid as the logits do are stored element by element.
  bool same_grid = true;
  if (p.has_grad)
    same_grid = p.grad.cls == 1 && p.logits_offset == p.grad_offset && on_grid(p.grad.outer - p.logits.outer) &&
                on_grid(p.grad.inner - p.logits.inner);
  c.general = p.general || !same_grid || p.inner > 1;
  // Every row on the 16-byte grid: no edges. Otherwise a row has up to 2 (lanes16 - 1) of them, one per thread.
  const bool whole = p.logits_offset == 0 && on_grid(p.classes) && (p.outer == 1 || on_grid(p.logits.outer)) &&
                     (p.inner == 1 || on_grid(p.logits.inner));
  auto without_gaps = [&](const Strides& s, int offset) {
    return offset == 0 && s.cls == 1 && (p.outer == 1 || s.outer == p.classes);
  };
  if (!c.general && p.classes <= (whole ? 32 : 8 * kTileClasses) && without_gaps(p.logits, p.logits_offset) &&
      (!p.has_grad || without_gaps(p.grad, p.grad_offset))) {
    c.lanes = 1;
    while (c.lanes * kTileClasses < p.classes) c.lanes *= 2;
    if (on_grid(32 / c.lanes * p.classes)) {  // every tile starts on the grid
      c.regime = Regime::tile;
      c.threads = kWarpRowThreads;
      const int64_t blocks = div_up(rows, kWarpRowThreads / c.lanes);
      const int64_t most = int64_t(device.multiprocessors) * kTileBlocks;
      c.grid = blocks < most ? blocks : most;
      return c;
    }
  }
  const int least_lanes = whole ? 1 : 2 * lanes16;
  const int64_t vectors = div_up(p.classes, lanes16);

  if (vectors <= (c.general ? 128 : 256)) {
    c.regime = Regime::warp_rows;
    c.vectors = vectors <= 128 ? 4 : 8;
    c.lanes = least_lanes;
    while (int64_t(c.lanes) * c.vectors < vectors) c.lanes *= 2;
    c.slice = vectors;
    c.threads = kWarpRowThreads;
    const int64_t blocks = div_up(rows, c.threads / c.lanes);
    const int64_t most = int64_t(device.multiprocessors) * warp_row_blocks(c.general, c.vectors);
    c.grid = blocks < most ? blocks : most;
    return c;
  }

  c.regime = Regime::block_rows;
  const int few = c.general ? 4 : 8;
  // 16-bit vectors take more registers to work on, so a thread holds fewer of them. Backward is not built for more.
  const int many = c.general || p.pass == Pass::backward ? few : p.element_bytes == 2 ? 12 : 16;
  c.vectors = few;
  if (!together) {
    c.parts = static_cast<int>(div_up(vectors, int64_t(kMaxRowThreads / 2) * few));
  } else if (vectors > few * kMaxRowThreads) {
    c.vectors = many;
    c.parts = vectors <= many * kMaxRowThreads ? 1 : 0;  // 0: not found yet
    double least = INFINITY;
    // A block of float64 has a multiprocessor to itself. Not every device has 16 of them side by side; all have 8.
    const int most_parts = p.element_bytes == 8 && device.max_cluster > 8 ? 8 : device.max_cluster;
    for (int parts = 2; parts <= most_parts && c.parts != 1; parts *= 2) {
      const int64_t slice = row_slice(vectors, parts);
      for (int per_thread : {few, many}) {
        if (slice > per_thread * kMaxRowThreads) continue;
        const double cost =
            tuning.few_vectors ? per_thread * 100 + parts : cluster_cost(slice, parts, per_thread, c.general);
        if (cost < least) least = cost, c.parts = parts, c.vectors = per_thread;
      }
    }
    // Forward alone keeps nothing of a row, so one block can walk along it, whatever its length: no cluster, as long as
    // there are rows for every multiprocessor. The general kernels have too little in flight for that.
    const bool alone =
        p.pass == Pass::forward && !c.general && rows >= int64_t(tuning.rows_to_stream) * device.multiprocessors;
    if (c.parts == 0 || (alone && c.parts > 1)) {
      c.regime = Regime::streaming_rows;
      c.vectors = !c.general ? 4 : p.element_bytes == 4 ? 1 : 2;  // what stays in registers on every architecture
      c.parts = alone ? 1 : device.max_cluster < 8 ? device.max_cluster : 8;
    }
    c.cluster = c.parts > 1;
  }
  c.slice = row_slice(vectors, c.parts);
  c.threads = row_threads(c.slice, c.vectors);
  // A block takes several rows, so that what it does once (the totals, its partial sums) weighs little; ten blocks
  // after one another in every place leave little of the GPU idle at the end.
  const int64_t blocks = int64_t(device.multiprocessors) * tuning.row_blocks;
  const int64_t most = together ? div_up(blocks, c.parts) : INT32_MAX / c.parts;
  c.grid = (rows < most ? rows : most) * c.parts;
  return c;
}

// Blocks of the kernel that sums up the targets; each leaves one partial sum of each total, and a warp adds them up.
inline int totals_blocks(int64_t rows, int64_t classes) {
  const int64_t items = rows > classes ? rows : classes;
  const int64_t blocks = div_up(items, 512);
  return static_cast<int>(blocks < 1 ? 1 : blocks < kMaxTotals ? blocks : kMaxTotals);
}

}  // namespace fastloss
