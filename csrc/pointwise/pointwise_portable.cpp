#define FASTLOSS_ISA portable
#include "pointwise_cpu_kernel.h"

namespace fastloss {
Status pointwise_forward_portable(const PointwiseArgs& a, ParallelFor f) { return portable::pointwise_forward(a, f); }
Status pointwise_backward_portable(const PointwiseArgs& a, ParallelFor f) { return portable::pointwise_backward(a, f); }
}  // namespace fastloss
