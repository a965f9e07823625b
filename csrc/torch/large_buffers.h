// Memory for large results on the CPU. A fresh 262 MB gradient costs 90 ms of page faults with 4 KiB pages and 30 ms
// with huge ones, more than the cross entropy that fills it; the same memory used again costs nothing. So buffers of
// this size are on huge pages where the system allows it, and up to two of them are kept when their tensor goes, given
// back to the operating system with MADV_FREE: it takes the pages whenever it needs them, and until then they are warm.
// FASTLOSS_KEEP_BUFFERS=0 in the environment turns the keeping off.
#pragma once
#include "support.h"

namespace fastloss {

constexpr int64_t kLargeBytes = int64_t(8) << 20;

// An uninitialised CPU tensor, or nothing where this is not supported (the caller then allocates as usual).
std::optional<Tensor> allocate_large(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type,
                                     int64_t bytes);

// Asks for huge pages behind the whole 2 MiB pages of [data, data + bytes); a hint that may be refused.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastloss
