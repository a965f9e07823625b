#include "cross_entropy_launch.cuh"

namespace fastloss {

template Status launch_cross_entropy<float>(const RowwiseConfig&, CrossEntropyParams<accum_t<float>>, void*);

int largest_row_cluster(int wanted) {
  LaunchShape shape;
  shape.block = kMaxRowThreads;
  shape.shared = static_cast<int>(sizeof(RowShared<float>));
  return largest_cluster(cross_entropy_row_kernel<float, false, Pass::forward_grad, false, true, 16>, shape, wanted);
}

}  // namespace fastloss
