#include "pointwise_launch.cuh"

namespace fastloss {
template Status launch_pointwise_streaming<bfloat16_t>(const LaunchShape&, const PointwiseParams&, void*);
}  // namespace fastloss
