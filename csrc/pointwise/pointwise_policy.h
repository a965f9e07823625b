// Which kernel takes a pointwise call on the GPU, and how it is launched: a pure function of the call. Host C++, no
// CUDA. The device is not asked: blocks and partial sums depend on the shape alone, so the bits do too.
//
//   streaming   one row; input, target and the input's gradient contiguous, of one 16- or 32-bit dtype, on 16-byte
//               boundaries; no mask, no weight, no gradient of the target
//   general     everything else, element by element
#pragma once
#include "pointwise.h"

namespace fastloss {

constexpr int kPointwiseThreads = 256;
constexpr int kPointwiseTile = 16;  // elements of each operand that a thread has in flight
constexpr int64_t kPointwiseMostBlocks = 2048;

enum class PointwisePass : int32_t { forward, backward, second };

// Whether the elements of a row are summed up: what the general kernel does and what its launcher prepares for.
FASTLOSS_HD bool sums_rows(const PointwiseArgs& a, PointwisePass pass) {
  return pass != PointwisePass::backward && a.reduction != Reduction::none;
}

struct PointwiseConfig {
  bool streaming = false;
  int64_t parts = 1;  // blocks per row
  int64_t grid = 1;
};

inline PointwiseConfig pointwise_config(const PointwiseArgs& a, PointwisePass pass) {
  PointwiseConfig c;
  auto fits = [&](const PointwiseOperand& o) {
    return !o.data || (o.type == a.input.type && (a.dim == 0 || o.strides[0] == 1) &&
                       reinterpret_cast<uintptr_t>(o.data) % 16 == 0);
  };
  c.streaming = pass != PointwisePass::second && a.rows == 1 && a.dim <= 1 && a.accum == DType::f32 &&
                a.reduction != Reduction::none && !a.weight.data && !a.mask.data && fits(a.input) && fits(a.target) &&
                fits(a.grad_input) && !a.grad_target.data;
  const int64_t per_block = int64_t(kPointwiseThreads) * (c.streaming ? kPointwiseTile : 8);
  // Few parts where there are rows enough; a single block, which needs no counter, for little.
  const int64_t most = a.rows < kPointwiseMostBlocks ? kPointwiseMostBlocks / (a.rows > 0 ? a.rows : 1) : 1;
  const int64_t parts = (a.cols + per_block - 1) / per_block;
  c.parts = parts <= 4 ? 1 : parts < most ? parts : most;
  const int64_t items = a.rows * c.parts, most_blocks = 16 * kPointwiseMostBlocks;
  c.grid = items < most_blocks ? items : most_blocks;
  return c;
}

}  // namespace fastloss
