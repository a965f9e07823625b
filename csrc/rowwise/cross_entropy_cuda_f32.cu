#include "cross_entropy_launch.cuh"

namespace fastloss {
template Status launch_cross_entropy<float>(const RowwiseConfig&, CrossEntropyParams<accum_t<float>>, void*);
}
