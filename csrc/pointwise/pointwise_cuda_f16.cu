#include "pointwise_launch.cuh"

namespace fastloss {
template Status launch_pointwise_streaming<half_t>(const LaunchShape&, const PointwiseParams&, void*);
}  // namespace fastloss
