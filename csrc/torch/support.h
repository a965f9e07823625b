// The edge to PyTorch, shared by every *_torch.cpp: dtypes, allocation, layouts, threads, streams, errors.
// LibTorch's stable ABI only. Errors here are a last line of defence behind the Python face; C++ standard exceptions
// arrive in Python as IndexError (out_of_range), ValueError (invalid_argument) and RuntimeError (the rest).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/types.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "../common/cuda_context.h"
#endif

namespace fastloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDims = 64;  // of any tensor, torch's own limit

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: throw std::runtime_error(std::string(name) + ": expected float32, float64, float16 or bfloat16");
  }
}
inline IndexType index_type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Long: return IndexType::i64;
    case ScalarType::Int: return IndexType::i32;
    case ScalarType::Short: return IndexType::i16;
    case ScalarType::Char: return IndexType::i8;
    case ScalarType::Byte: return IndexType::u8;
    case ScalarType::UInt16: return IndexType::u16;
    case ScalarType::UInt32: return IndexType::u32;
    case ScalarType::UInt64: return IndexType::u64;
    default: throw std::runtime_error("target: expected an integer dtype");
  }
}
inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::Half || s == ScalarType::BFloat16;
}
inline ScalarType scalar_type_of(DType t) {
  return t == DType::f32   ? ScalarType::Float
         : t == DType::f64 ? ScalarType::Double
         : t == DType::f16 ? ScalarType::Half
                           : ScalarType::BFloat16;
}

void set_contiguous_strides(const int64_t* sizes, int64_t dim, int64_t* strides);

// An uninitialised tensor on the device of `like`. Not through the dispatcher: 0.3 us instead of 1.
Tensor allocate(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type);
Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type);  // contiguous
Tensor allocate(const Tensor& like, int64_t count, ScalarType type);                      // [count]
Tensor allocate_scalar(const Tensor& like, ScalarType type);                              // []
// The same for results of the operands' size, `bytes` in all: large CPU ones lie on huge pages, since fresh 4 KiB pages
// cost more than the loss itself.
Tensor allocate_result(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type,
                       int64_t bytes);
// torch.empty_like by way of it.
Tensor allocate_like(const Tensor& t);

// Raises unless t holds `count` contiguous elements of `type` on the device of `like`.
void require_vector(const Tensor& t, const char* name, int64_t count, ScalarType type, const Tensor& like);

// A tensor [N, C, d1, ...] seen as [outer, classes, inner] with inner * outer rows in row-major order of
// (N, d1, ...). All tensors of a call must allow the same split; where they do not, try_collapse() gives nothing and
// collapse() raises.
struct Collapsed {
  int64_t outer = 1, classes = 0, inner = 1;
  Strides strides[4];  // of the tensors in the order given
};
std::optional<Collapsed> try_collapse(std::initializer_list<const Tensor*> tensors);
Collapsed collapse(std::initializer_list<const Tensor*> tensors);

// PyTorch's thread pool, for the CPU kernels.
void torch_parallel(int64_t count, int64_t grain, RangeBody body, void* ctx);

// Raises what a core function returned. `target` names the row in its own shape; ignore_index, if the loss has one.
void raise_if_failed(const Status& status, const Tensor& target, int64_t classes, std::optional<int64_t> ignore_index);

#if defined(FASTLOSS_HAVE_CUDA)
// Raises the IndexError that a kernel has left, if any; never waits for the GPU.
void raise_deferred_error();

// One call on the GPU: makes the tensor's device current, finds PyTorch's current stream, and first raises what an
// earlier kernel found (a bad target), which costs one read of host memory.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& t);
  CudaContext& context() { return context_; }
  // Scratch from PyTorch's allocator, alive until this object goes (the allocator keeps it for the stream's order).
  CudaContext& with_workspace(int64_t bytes);

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  std::optional<Tensor> workspace_;
  CudaContext context_;
};
#endif

}  // namespace fastloss
