#include "pointwise_launch.cuh"

namespace fastloss {
template Status launch_pointwise_streaming<float>(const LaunchShape&, const PointwiseParams&, void*);
template Status launch_pointwise_general<float>(const LaunchShape&, const PointwiseParams&, void*);
}  // namespace fastloss
