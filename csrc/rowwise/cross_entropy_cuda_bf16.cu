#include "cross_entropy_launch.cuh"

namespace fastloss {
template Status launch_cross_entropy<bfloat16_t>(const RowwiseConfig&, CrossEntropyParams<accum_t<bfloat16_t>>, void*);
}
