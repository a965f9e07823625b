#include "large_buffers.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#endif

namespace fastloss {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Since torch 2.11; weak so that the same binary loads into 2.10.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace {

constexpr int64_t kHugePage = int64_t(1) << 21;

// A mapping; `data` is its first address on a huge page boundary. Travels as the deleter's context.
struct Buffer {
  void* mapping;
  size_t mapped;
  void* data;
  int64_t bytes;
};

void unmap(Buffer* b) {
  munmap(b->mapping, b->mapped);
  delete b;
}

class Kept {
 public:
  // The smallest kept buffer that holds `bytes` without wasting more than a quarter; null if there is none.
  Buffer* take(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    Buffer** best = nullptr;
    for (Buffer*& b : buffers_)
      if (b && b->bytes >= bytes && b->bytes <= bytes + bytes / 4 && (!best || b->bytes < (*best)->bytes)) best = &b;
    if (!best) return nullptr;
    Buffer* b = *best;
    *best = nullptr;
    return b;
  }
  void keep(Buffer* b) {
    static const bool enabled = [] {
      const char* e = std::getenv("FASTLOSS_KEEP_BUFFERS");
      return e == nullptr || std::strcmp(e, "0") != 0;
    }();
    Buffer* drop = b;
    if (enabled && madvise(b->data, size_t(b->bytes), MADV_FREE) == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      int at = oldest_;
      for (int i = 0; i < kCount; ++i)
        if (!buffers_[i]) at = i;
      drop = buffers_[at];
      buffers_[at] = b;
      oldest_ = (at + 1) % kCount;
    }
    if (drop) unmap(drop);
  }

 private:
  static constexpr int kCount = 2;
  std::mutex mutex_;
  Buffer* buffers_[kCount] = {};
  int oldest_ = 0;
};

Kept& kept() {
  static Kept* k = new Kept;  // never destroyed: tensors may outlive static objects
  return *k;
}

Buffer* map(int64_t bytes) {
  const size_t rounded = (size_t(bytes) + kHugePage - 1) & ~size_t(kHugePage - 1), mapped = rounded + kHugePage;
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  void* data = reinterpret_cast<void*>((uintptr_t(mapping) + kHugePage - 1) & ~uintptr_t(kHugePage - 1));
  madvise(data, rounded, MADV_HUGEPAGE);
  return new Buffer{mapping, mapped, data, int64_t(rounded)};
}

}  // namespace

std::optional<Tensor> allocate_large(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type,
                                     int64_t bytes) {
  if (bytes < kLargeBytes || torch_from_blob == nullptr) return std::nullopt;
  Buffer* buffer = kept().take(bytes);
  if (!buffer) buffer = map(bytes);
  if (!buffer) return std::nullopt;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      buffer->data, dim, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void*, void* ctx) { kept().keep(static_cast<Buffer*>(ctx)); },
      buffer);
  if (error != AOTI_TORCH_SUCCESS) {
    unmap(buffer);
    return std::nullopt;
  }
  return Tensor(handle);
}

void advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) & ~uintptr_t(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

std::optional<Tensor> allocate_large(const int64_t*, const int64_t*, int64_t, ScalarType, int64_t) {
  return std::nullopt;
}
void advise_huge_pages(void*, int64_t) {}

#endif

}  // namespace fastloss
