#include "cross_entropy_launch.cuh"

namespace fastloss {
template Status launch_cross_entropy<double>(const RowwiseConfig&, CrossEntropyParams<accum_t<double>>, void*);
}
