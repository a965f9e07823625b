// Which kernel takes a pointwise call on the GPU, and how it is launched: a pure function of the call. Host C++, no
// CUDA. The device is not asked: blocks and partial sums depend on the call alone, so the bits do too.
//
//   streaming   of the losses that have it, one row of two operands; these and their gradients contiguous, of one 16-
//   or 32-bit dtype, on 16-byte
//               boundaries; no mask, no weight, no further operand
//   vectors     everything else of long rows, if an operand has neighbours next to each other: eight floats or four
//               doubles at a time
//   elements    one at a time
#pragma once
#include "pointwise.h"

namespace fastloss {

constexpr int kPointwiseThreads = 256;
constexpr int kPointwiseTile = 16;   // streaming: elements of each operand that a thread has in flight
constexpr int kPointwiseGroup = 32;  // vectors: the same, in bytes of the accumulation type
constexpr int64_t kPointwiseMostBlocks = 2048;

enum class PointwisePass : int32_t { forward, backward };
enum class PointwiseRegime : int32_t { streaming, vectors, elements };

inline const char* pointwise_regime_name(PointwiseRegime regime) {
  switch (regime) {
    case PointwiseRegime::streaming: return "streaming";
    case PointwiseRegime::vectors: return "general, by vectors";
    case PointwiseRegime::elements: return "general, by elements";
  }
  return "";
}

struct PointwiseConfig {
  PointwisePass pass = PointwisePass::forward;
  PointwiseRegime regime = PointwiseRegime::elements;
  bool sums_rows = false;  // whether the elements of a row are summed up
  bool wide = false;       // streaming: on 32-byte boundaries
  int64_t parts = 1;       // blocks per row
  int64_t grid = 1;
  // Scratch on the device, 16-byte aligned, need not be initialised: counters[rows], then partial sums
  // [sums + 1][rows * parts].
  int64_t counter_bytes = 0, workspace_bytes = 0;
};

inline PointwiseConfig pointwise_config(const PointwiseArgs& a, PointwisePass pass) {
  PointwiseConfig c;
  c.pass = pass;
  c.sums_rows = pass == PointwisePass::forward && a.reduction != Reduction::none;
  uintptr_t addresses = 0;
  auto fits = [&](const PointwiseOperand& o) {
    addresses |= reinterpret_cast<uintptr_t>(o.data);
    return !o.data || (o.type == a.operands[0].type && is_flat(a, o));
  };
  auto has_neighbours = [&](const PointwiseOperand& o) {
    return o.data && (is_flat(a, o) || o.strides[a.dim - 1] == 1);
  };
  bool streams = a.streams && a.rows == 1 && a.accum == DType::f32 && a.reduction != Reduction::none &&
                 !a.weight.data && !a.multiplier.data && !a.mask.data && !a.operands[2].data && !a.operands[3].data;
  bool neighbours = false;
  for (int k = 0; k < kPointwiseOperands; ++k) {
    streams = streams && fits(a.operands[k]) && fits(a.grads[k]);
    neighbours = neighbours || has_neighbours(a.operands[k]);
  }
  const int64_t turn = int64_t(kPointwiseThreads) * 8;
  c.regime = streams && addresses % 16 == 0 ? PointwiseRegime::streaming
             : neighbours && a.cols >= turn ? PointwiseRegime::vectors
                                            : PointwiseRegime::elements;
  c.wide = addresses % 32 == 0;
  // Few parts where there are rows enough; a single block, which needs no counter, for little.
  const int64_t per_block = c.regime == PointwiseRegime::elements ? turn : int64_t(kPointwiseThreads) * kPointwiseTile;
  const int64_t most = a.rows < kPointwiseMostBlocks ? kPointwiseMostBlocks / (a.rows > 0 ? a.rows : 1) : 1;
  const int64_t parts = (a.cols + per_block - 1) / per_block;
  c.parts = parts <= 4 ? 1 : parts < most ? parts : most;
  const int64_t items = a.rows * c.parts, most_blocks = 16 * kPointwiseMostBlocks;
  c.grid = items < most_blocks ? items : most_blocks;
  if (c.sums_rows && c.parts > 1) {
    c.counter_bytes = (a.rows * 4 + 15) / 16 * 16;
    c.workspace_bytes = c.counter_bytes + (a.sums + 1) * items * int64_t(sizeof(double));
  }
  return c;
}

}  // namespace fastloss
