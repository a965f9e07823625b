// From a launch configuration to one of the instantiated kernels, per dtype of the operands.
#pragma once
#include "pointwise_kernels.cuh"

namespace fastloss {

// The streaming kernel of a dtype, and the general one of an accumulation type.
template <class T>
Status launch_pointwise_streaming(const LaunchShape& shape, const PointwiseParams& params, void* stream) {
  Status status;
  gpu::with_loss(gpu::Losses{}, params.a.loss, [&](auto loss) {
    status = launch(pointwise_streaming_kernel<decltype(loss), T>, shape, stream, params);
  });
  return status;
}
template <class A>
Status launch_pointwise_general(const LaunchShape& shape, const PointwiseParams& params, void* stream) {
  Status status;
  gpu::with_loss(gpu::Losses{}, params.a.loss, [&](auto loss) {
    status = launch(pointwise_general_kernel<decltype(loss), A>, shape, stream, params);
  });
  return status;
}

// Instantiated in pointwise_cuda_<dtype>.cu.
extern template Status launch_pointwise_streaming<float>(const LaunchShape&, const PointwiseParams&, void*);
extern template Status launch_pointwise_streaming<half_t>(const LaunchShape&, const PointwiseParams&, void*);
extern template Status launch_pointwise_streaming<bfloat16_t>(const LaunchShape&, const PointwiseParams&, void*);
extern template Status launch_pointwise_general<float>(const LaunchShape&, const PointwiseParams&, void*);
extern template Status launch_pointwise_general<double>(const LaunchShape&, const PointwiseParams&, void*);

}  // namespace fastloss
