// The totals of a call of cross entropy on the GPU, before the kernel that needs them.
#pragma once
#include "cross_entropy_kernel_parts.cuh"

namespace fastloss {

// One partial sum of D, Dn, counted rows and class weights per block, over a fixed share of the rows and classes.
// A normalizer takes the place of D and Dn. Also empties the counter of the kernel that follows.
template <class A>
__global__ void __launch_bounds__(256, 1) cross_entropy_totals_kernel(const CrossEntropyParams<A> p) {
  constexpr int kN = 8;  // rows per thread in flight
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const bool weighted = p.weight && !p.soft, sampled = p.sample_weight, classes = p.weight && p.smooth;
  double weight = 0, count = 0, counted = 0, class_weights = 0;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  if (p.pass != Pass::backward) {
    for (int64_t base = first; base < p.rows; base += kN * step) {
      int64_t t[kN];
      if (!p.soft && p.index_type == IndexType::i64) {  // the usual one by itself, so that the loads go out together
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int64_t row = base + j * step;
          t[j] = row < p.rows ? static_cast<const int64_t*>(p.target)[row] : p.ignore_index;
        }
      } else {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int64_t row = base + j * step;
          t[j] = row < p.rows ? load_target_value<true>(p, row) : p.ignore_index;
        }
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int64_t row = base + j * step;
        const RowTarget<true> target = classify_target<true>(p, t[j]);
        if (row >= p.rows || !target.counts) continue;
        const double s = sampled ? double(p.sample_weight[row]) : 1.0;
        if (sampled) count += s;
        if (weighted) weight += s * double(p.weight[t[j] - p.class_offset]);
        counted += 1;
      }
    }
  }
  if (classes)
    for (int64_t c = first; c < p.all_classes; c += step) class_weights += double(p.weight[c - p.class_offset]);
  counted = block_sum(counted, scratch);
  count = sampled ? block_sum(count, scratch + kWarp) : counted;
  weight = weighted ? block_sum(weight, scratch + 2 * kWarp) : count;
  if (classes) class_weights = block_sum(class_weights, scratch + 3 * kWarp);
  if (p.normalizer && p.pass != Pass::backward) weight = count = blockIdx.x == 0 ? *p.normalizer : 0;
  if (threadIdx.x == 0) {
    double* d = p.totals + blockIdx.x;
    d[int(Total::weight) * kMaxTotals] = weight;
    d[int(Total::count) * kMaxTotals] = count;
    d[int(Total::counted) * kMaxTotals] = counted;
    d[int(Total::class_weights) * kMaxTotals] = class_weights;
    if (blockIdx.x == 0 && p.counter) *p.counter = 0;
  }
}

}  // namespace fastloss
