#include "scratch.h"

#include <cstdlib>

namespace fastloss {
namespace {

// AddressSanitizer sees no bounds within a block.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kBlockBytes = 0;
#else
constexpr size_t kBlockBytes = size_t(64) << 10;
#endif

void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) std::abort();  // little beside the operands: the process is beyond help
  return p;
}

class Block {
 public:
  ~Block() { std::free(data_); }
  void* take(size_t bytes) {
    if (bytes > kBlockBytes - used_) return allocate(bytes);
    if (data_ == nullptr) data_ = static_cast<unsigned char*>(allocate(kBlockBytes));
    void* p = data_ + used_;
    used_ += bytes;
    return p;
  }
  void give_back(void* p) {
    const auto at = static_cast<unsigned char*>(p);
    if (data_ != nullptr && at >= data_ && at < data_ + kBlockBytes)
      used_ = size_t(at - data_);
    else
      std::free(p);
  }

 private:
  unsigned char* data_ = nullptr;
  size_t used_ = 0;
};

thread_local Block block;

}  // namespace

void* take_scratch(size_t bytes) { return block.take(bytes); }
void return_scratch(void* p) { block.give_back(p); }

}  // namespace fastloss
