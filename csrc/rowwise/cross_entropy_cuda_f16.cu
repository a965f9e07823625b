#include "cross_entropy_launch.cuh"

namespace fastloss {
template Status launch_cross_entropy<half_t>(const RowwiseConfig&, CrossEntropyParams<accum_t<half_t>>, void*);
}
