// Scratch memory of the CPU kernels: what a call needs while it runs, given back in the reverse order of its taking.
#pragma once
#include <cstddef>

namespace fastloss {

// `bytes` (a multiple of 64), aligned to 64. What is small lies in a block that the thread keeps: a call of a few
// kilobytes would otherwise ask the allocator five times, and make it hand pages back to the system and fetch them
// again.
void* take_scratch(size_t bytes);
void return_scratch(void* p);

}  // namespace fastloss
