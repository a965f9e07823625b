// From a launch configuration to one of the kernels of a group of losses.
#pragma once
#include "pointwise_cuda.h"
#include "pointwise_kernels.cuh"

namespace fastloss {

// Calls whose accumulation type is A. Defined in the group's file for that type, see groups.cmake.
template <LossGroup kGroup, class A>
Status launch_pointwise(const LaunchShape& shape, const PointwiseParams& params, void* stream);

template <LossGroup kGroup, class A>
Status launch_pointwise_general(const LaunchShape& shape, const PointwiseParams& params, void* stream) {
  Status status;
  gpu::with_loss(typename gpu::LossesOf<kGroup>::type{}, params.a.loss, [&](auto loss) {
    status = launch(pointwise_general_kernel<decltype(loss), A>, shape, stream, params);
  });
  return status;
}

template <LossGroup kGroup>
Status launch_pointwise_streaming(const LaunchShape& shape, const PointwiseParams& params, void* stream) {
  Status status;
  gpu::with_loss(typename gpu::LossesOf<kGroup>::type{}, params.a.loss, [&](auto loss) {
    using Loss = decltype(loss);
    if constexpr (Loss::streams) {
      switch (params.a.operands[0].type) {
        case DType::f16: status = launch(pointwise_streaming_kernel<Loss, half_t>, shape, stream, params); break;
        case DType::bf16: status = launch(pointwise_streaming_kernel<Loss, bfloat16_t>, shape, stream, params); break;
        default: status = launch(pointwise_streaming_kernel<Loss, float>, shape, stream, params);
      }
    }
  });
  return status;
}

}  // namespace fastloss
