// Cross entropy on the GPU: the kernels. What is computed stands in cross_entropy.h, the row's mathematics in
// cross_entropy_math.h, who is launched when in cross_entropy_policy.h.
//
//   cross_entropy_totals_kernel   D, Dn, counted rows, sum of class weights: partial sums, O(rows + classes)
//   cross_entropy_row_kernel      class stride 1: warp rows, block rows, clusters, streaming
//   cross_entropy_tile_kernel     class stride 1, no gaps between rows, up to 192 classes: 4 to 32 rows at a time
//                                 through the shared memory of a warp
//   cross_entropy_column_kernel   (N, C, d1, ...), up to 24 classes: a thread has 4 bytes of every class in registers
//   cross_entropy_plane_kernel    everything else ((N, C, d1, ...), any strides): 32 lanes along the inner axis, the
//                                 warps of a block share the classes; in registers up to 160 classes, else re-read
//
// Bytes moved: forward 1 read; value and gradient 1 read + 1 write (streaming rows, and planes of more than 160
// classes: 2 reads); backward 1 read + 1 write.
#pragma once
#include "cross_entropy_column_kernel.cuh"
#include "cross_entropy_plane_kernel.cuh"
#include "cross_entropy_row_kernel.cuh"
#include "cross_entropy_tile_kernel.cuh"
#include "cross_entropy_totals_kernel.cuh"
