#include "pointwise_launch.cuh"

namespace fastloss {
template Status launch_pointwise_general<double>(const LaunchShape&, const PointwiseParams&, void*);
}  // namespace fastloss
