#include "scale_grad_cuda.h"
#include "scale_grad_kernels.cuh"

namespace fastloss {

Status scale_grad_cuda(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type,
                       const CudaContext& context) {
  const ScaleGradParams params{grad, out, count, scale, scale_type};
  const int64_t per_block = kScaleThreads * kScaleVectors * (16 / size_of(type));
  const int64_t blocks = (count + per_block - 1) / per_block;
  // About as many as run at once, so that a launch that finds a scale of 1 is over soon.
  const int64_t most = int64_t(device_properties(context.device).multiprocessors) * 8;
  LaunchShape shape;
  shape.grid = blocks < most ? blocks : most;
  shape.block = kScaleThreads;
  Status status;
  with_type(type, [&](auto tag) { status = launch(scale_grad_kernel<decltype(tag)>, shape, context.stream, params); });
  return status;
}

}  // namespace fastloss
