#include "support.h"

#include <cstring>

#include "domains.h"
#include "large_buffers.h"

#if defined(FASTLOSS_HAVE_CUDA)
#include "../common/errors_cuda.h"
#endif

namespace fastloss {

namespace {
void check(AOTITorchError e, const char* what) {
  if (e != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("fastloss: ") + what + " failed");
}

std::string row_name(const Tensor& target, int64_t row) {
  std::string name = "target[";
  const int64_t dim = target.dim();
  if (dim == 0) return "target";
  int64_t below = 1;
  for (int64_t d = 1; d < dim; ++d) below *= target.size(d);
  for (int64_t d = 0; d < dim; ++d) {
    name += (d ? ", " : "") + std::to_string(below ? row / below : 0);
    row = below ? row % below : 0;
    if (d + 1 < dim) below /= target.size(d + 1) ? target.size(d + 1) : 1;
  }
  return name + "]";
}
}  // namespace

void set_contiguous_strides(const int64_t* sizes, int64_t dim, int64_t* strides) {
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
}

Tensor allocate(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type) {
  int32_t device_type, device_index;
  check(aoti_torch_get_device_type(like.get(), &device_type), "reading a device");
  check(aoti_torch_get_device_index(like.get(), &device_index), "reading a device");
  AtenTensorHandle handle;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("fastloss: out of memory");
  return Tensor(handle);
}
Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
  int64_t strides[kMaxDims];
  set_contiguous_strides(sizes, dim, strides);
  return allocate(like, sizes, strides, dim, type);
}
Tensor allocate(const Tensor& like, int64_t count, ScalarType type) { return allocate(like, &count, 1, type); }
Tensor allocate_scalar(const Tensor& like, ScalarType type) {
  const int64_t none = 0;
  return allocate(like, &none, 0, type);
}
Tensor allocate_result(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type,
                       int64_t bytes) {
  if (!like.is_cpu()) return allocate(like, sizes, strides, dim, type);
  if (bytes >= kLargeBytes)
    if (std::optional<Tensor> large = allocate_large(sizes, strides, dim, type, bytes)) return *large;
  Tensor r = allocate(like, sizes, strides, dim, type);
  advise_huge_pages(r.data_ptr(), bytes);
  return r;
}
Tensor allocate_like(const Tensor& t) {
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (t.is_contiguous())
    return allocate_result(t, t.sizes().data(), t.strides().data(), t.dim(), t.scalar_type(), bytes);
  // A dense tensor that is not contiguous (channels last) takes its strides from torch and its memory from here.
  Tensor r = torch::stable::empty_like(t);
  if (!t.is_cpu() || bytes < kLargeBytes) return r;
  return allocate_result(r, r.sizes().data(), r.strides().data(), r.dim(), r.scalar_type(), bytes);
}

void require_vector(const Tensor& t, const char* name, int64_t count, ScalarType type, const Tensor& like) {
  if (t.numel() != count || !t.is_contiguous() || t.scalar_type() != type || t.is_cuda() != like.is_cuda() ||
      t.get_device_index() != like.get_device_index())
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) +
                                " contiguous elements of the dtype that the kernel reads, on the device of the input");
}

std::optional<Collapsed> try_collapse(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  const auto sizes = first.sizes();
  const int64_t dim = int64_t(sizes.size());
  constexpr size_t kMost = 4;
  const int64_t* strides[kMost];
  size_t count = 0;
  for (const Tensor* t : tensors) strides[count++] = t->strides().data();
  Collapsed r;
  r.classes = sizes[1];
  int64_t rows = 1;
  for (int64_t d = 0; d < dim; ++d)
    if (d != 1) rows *= sizes[d];
  if (rows == 0 || r.classes == 0) {  // rows without classes keep their number; nothing else matters
    r.outer = rows;
    return r;
  }
  // The row dimensions (all but dim 1), outermost first, without those of size 1.
  int64_t dims[kMaxDims], n = 0, size[kMaxDims];
  for (int64_t d = 0; d < dim; ++d)
    if (d != 1 && sizes[d] != 1) dims[n] = d, size[n++] = sizes[d];
  auto merges = [&](int64_t k) {  // dims[k] and dims[k + 1] are one, in every tensor
    for (size_t i = 0; i < count; ++i)
      if (strides[i][dims[k]] != strides[i][dims[k + 1]] * size[k + 1]) return false;
    return true;
  };
  int64_t split = n;  // first dimension of the inner group
  for (int64_t k = 0; k + 1 < n; ++k)
    if (!merges(k)) {
      if (split != n) return std::nullopt;
      split = k + 1;
    }
  if (split == n && n > 0 && strides[0][1] != 1) split = 0;  // one group: rows outside unless classes are strided
  for (int64_t k = 0; k < n; ++k) (k < split ? r.outer : r.inner) *= size[k];
  for (size_t i = 0; i < count; ++i) {
    r.strides[i].cls = strides[i][1];
    r.strides[i].outer = split > 0 ? strides[i][dims[split - 1]] : 0;
    r.strides[i].inner = split < n ? strides[i][dims[n - 1]] : 0;
  }
  return r;
}
Collapsed collapse(std::initializer_list<const Tensor*> tensors) {
  const std::optional<Collapsed> r = try_collapse(tensors);
  if (!r) throw std::invalid_argument("fastloss: this layout needs logits.contiguous()");
  return *r;
}

void torch_parallel(int64_t count, int64_t grain, RangeBody body, void* ctx) {
  if (count <= 0) return;
  if (count <= grain) return body(ctx, 0, count);
  struct Call {
    RangeBody body;
    void* ctx;
  } call{body, ctx};
  check(torch_parallel_for(
            0, count, grain,
            [](int64_t begin, int64_t end, void* p) {
              const Call* c = static_cast<const Call*>(p);
              c->body(c->ctx, begin, end);
            },
            &call),
        "parallel_for");
}

void raise_if_failed(const Status& status, const Tensor& target, int64_t classes, std::optional<int64_t> ignore_index) {
  switch (status.code) {
    case Status::ok: return;
    case Status::bad_target:
      throw std::out_of_range(
          "Target " + std::to_string(status.value) + " is out of bounds. " + row_name(target, status.row) + " = " +
          std::to_string(status.value) + ", but there are " + std::to_string(classes) +
          " classes: expected 0 <= target < " + std::to_string(classes) +
          (ignore_index ? ", or ignore_index (" + std::to_string(*ignore_index) + ") for targets to leave out." : "."));
    case Status::cuda_error:
      throw std::runtime_error("fastloss: CUDA error " + std::to_string(status.value) + " at a kernel launch");
    case Status::unsupported: throw std::runtime_error("fastloss: no kernel for this input");
  }
}

void raise_outside_domain(Domain domain, int operand, int64_t value, const std::string& where) {
  static constexpr const char* names[kPointwiseOperands] = {"input", "target", "var", "the fourth operand"};
  double number;
  std::memcpy(&number, &value, sizeof number);
  const std::string name = names[operand], found = "; there is " + std::to_string(number) + where;
  if (domain == Domain::not_negative)
    throw std::invalid_argument(name + " has negative entry/entries: expected 0 or more" + found +
                                ". Make it positive before, by torch.exp or softplus.");
  throw std::runtime_error("all elements of " + name + " should be between 0 and 1" + found +
                           (operand == 0 ? ". Apply torch.sigmoid before, or give the scores themselves to "
                                           "binary_cross_entropy_with_logits."
                                         : ". Clamp it before."));
}

#if defined(FASTLOSS_HAVE_CUDA)
// Only libtorch_cuda has it; the same binary also serves CPU builds of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

CudaCall::CudaCall(const Tensor& t) : guard_(t.get_device_index()), like_(t) {
  raise_deferred_error();
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("fastloss: this build of torch has no CUDA");
  context_.device = t.get_device_index();
  check(aoti_torch_get_current_cuda_stream(context_.device, &context_.stream), "reading the current stream");
}
CudaContext& CudaCall::with_workspace(int64_t bytes) {
  if (bytes > 0) {
    workspace_ = allocate(like_, bytes, ScalarType::Byte);
    context_.workspace = workspace_->data_ptr();
    context_.workspace_bytes = bytes;
  }
  return context_;
}

void raise_deferred_error() {
  if (!bad_target_peek_cuda()) return;
  int32_t what = 0;
  const Status s = bad_target_take_cuda(&what);
  if (s.code == Status::bad_target && what != 0)
    raise_outside_domain(Domain(what / kPointwiseOperands), what % kPointwiseOperands, s.value,
                         ", found on the GPU by an earlier call, whose loss is nan. "
                         "fastloss.set_error_mode('immediate') raises in the call itself");
  if (s.code == Status::bad_target)
    throw std::out_of_range("Target " + std::to_string(s.value) + " is out of bounds. It was found on the GPU by an " +
                            "earlier call, at row " + std::to_string(s.row) +
                            " of its flattened target; that row had " +
                            "loss nan and gradient 0. fastloss.set_error_mode('immediate') raises in the call itself.");
}
#endif

}  // namespace fastloss
