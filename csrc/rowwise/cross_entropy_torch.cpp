// Binding of cross entropy: reads arguments, checks, allocates, hands raw pointers to the core. Schemas at the end.
// The operators are private: their outputs carry no autograd, the Python face adds it.
//
//   logits         [N, C, d1, ...] float32, float64, float16, bfloat16; any strides
//   target         [N, d1, ...] any integer dtype, or [N, C, d1, ...] floating probabilities; any strides
//   weight         [C] (of a shard: [total_classes]), sample_weight [N, d1, ...]: contiguous, accumulation dtype
//   (float64
//                  for float64 logits, else float32)
//   normalizer     [] float64
//   loss           [] or [N, d1, ...], of loss_dtype (the value of DType); of the plain operators in the logits' dtype
//   saved          what backward needs, opaque; empty unless asked for
//   stats          of a shard: [fields, N, d1, ...], see Stat in cross_entropy.h
//
// Logits, probabilities and gradients are walked as they lie wherever the kernels' strides can do that (collapse).
// Where they cannot, contiguous copies take their place here, and nobody else needs to know.
#include "../common/cpu_isa.h"
#include "../torch/support.h"
#include "cross_entropy_cpu_policy.h"
#include "row_maps.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "cross_entropy_cuda.h"
#endif

#include <vector>

namespace fastloss {
namespace {

using OptionalTensor = std::optional<Tensor>;

enum Flags : int64_t {
  kSave = 1,
  kGrad = 2,
  kAllIgnoredZero = 4,
  kZeroTimesInf = 8,
  kStats = 16,  // log-sum-exp, arg-max, accuracy, entropy; row_stats: with best, best_at and exp_dot
};

// The arguments of an operator as the dispatcher hands them over, each to be taken once, in order; results go back the
// same way.
class Stack {
 public:
  explicit Stack(StableIValue* values) : results_(values), next_(values) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  void put(const Tensor& t) { *results_++ = torch::stable::detail::from(t); }
  void put(const std::string& s) { *results_++ = torch::stable::detail::from(s); }

 private:
  StableIValue *results_, *next_;
};

struct Range {  // of a shard
  int64_t class_offset = 0, total_classes = 0;

  Range() = default;
  explicit Range(Stack& stack) : class_offset(stack.take<int64_t>()), total_classes(stack.take<int64_t>()) {}
};

struct Plain {};  // the arguments of the plain operators

// What most calls leave at their defaults comes last, so that they need not pass it.
struct Arguments {
  Tensor logits, target;
  int64_t reduction, loss_dtype, flags = 0;
  OptionalTensor weight, sample_weight, normalizer;
  int64_t ignore_index = -100;
  double label_smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1;
  int64_t row_map = 0;
  std::vector<double> map_params, margins;

  Arguments(Stack& stack, Plain)
      : logits(stack.take<Tensor>()),
        target(stack.take<Tensor>()),
        reduction(stack.take<int64_t>()),
        loss_dtype(int64_t(dtype_of(logits, "logits"))) {}

  explicit Arguments(Stack& stack) : Arguments(stack, Plain()) {
    loss_dtype = stack.take<int64_t>();
    flags = stack.take<int64_t>();
    for (OptionalTensor* t : {&weight, &sample_weight, &normalizer}) *t = stack.take<OptionalTensor>();
    ignore_index = stack.take<int64_t>();
    for (double* x : {&label_smoothing, &z_loss, &softcap, &logit_scale}) *x = stack.take<double>();
    row_map = stack.take<int64_t>();
    map_params = stack.take<std::vector<double>>();
    margins = stack.take<std::vector<double>>();
  }
};

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// One operator call: the contract's arguments, and the tensors whose storage they point into.
struct CrossEntropyCall {
  CrossEntropyArgs args;
  Tensor logits, target;
  const OptionalTensor weight, sample_weight, normalizer;

  explicit CrossEntropyCall(const Arguments& o, const Range& range = {})
      : logits(o.logits), target(o.target), weight(o.weight), sample_weight(o.sample_weight), normalizer(o.normalizer) {
    const int64_t dim = logits.dim();
    if (dim < 2) throw std::invalid_argument("logits: expected [N, C, ...]");
    const auto sizes = logits.sizes();
    args.logits_type = dtype_of(logits, "logits");
    args.classes = sizes[1];
    args.outer = 1;  // all rows, until set_layout
    for (int64_t d = 0; d < dim; ++d)
      if (d != 1) args.outer *= sizes[d];
    const int64_t rows = args.outer;
    args.soft = is_floating(target);
    if (args.soft) {
      if (target.numel() != logits.numel() || target.dim() != dim)
        throw std::invalid_argument("target: probabilities need the shape of the logits");
      args.prob_type = dtype_of(target, "target");
    } else {
      if (target.numel() != rows) throw std::invalid_argument("target: expected one class index per row");
      if (!target.is_contiguous()) target = torch::stable::contiguous(target);
      args.index_type = index_type_of(target);
      args.target = target.data_ptr();
    }
    if (!same_device(target, logits)) throw std::invalid_argument("target: expected the device of the logits");
    if (range.total_classes < 0 || range.class_offset < 0 ||
        (range.total_classes > 0 && range.class_offset + args.classes > range.total_classes))
      throw std::invalid_argument("class_offset: expected a range of the total_classes, got " +
                                  std::to_string(range.class_offset) + " and " + std::to_string(args.classes) +
                                  " classes of " + std::to_string(range.total_classes));
    args.class_offset = range.class_offset;
    args.total_classes = range.total_classes;
    if (weight) {
      require_vector(*weight, "weight", args.all_classes(), accum(), logits);
      args.weight = weight->data_ptr();
    }
    if (sample_weight) {
      require_vector(*sample_weight, "sample_weight", rows, accum(), logits);
      args.sample_weight = sample_weight->data_ptr();
    }
    if (normalizer) {
      require_vector(*normalizer, "normalizer", 1, ScalarType::Double, logits);
      args.normalizer = static_cast<const double*>(normalizer->data_ptr());
    }
    if (o.loss_dtype < 0 || o.loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    if (o.row_map < 0 || o.row_map >= kRowMapCount || o.map_params.size() > 2)
      throw std::invalid_argument("row_map: expected a number from 0 to " + std::to_string(kRowMapCount - 1) +
                                  " and two parameters at most");
    args.loss_type = DType(o.loss_dtype);
    args.reduction = Reduction(o.reduction);
    args.ignore_index = o.ignore_index;
    args.label_smoothing = o.label_smoothing;
    args.z_loss = o.z_loss;
    args.softcap = o.softcap;
    args.logit_scale = o.logit_scale;
    args.row_map = int32_t(o.row_map);
    for (size_t i = 0; i < o.map_params.size(); ++i) args.map_params[i] = o.map_params[i];
    if (o.margins.size() == 2) args.margin_angle = o.margins[0], args.margin_cosine = o.margins[1];
    if ((!o.margins.empty() && o.margins.size() != 2) || !args.margin_is_supported())
      throw std::invalid_argument(
          "margins: expected an angle and a cosine, class indices, all classes, logit_scale > 0");
    args.all_ignored_zero = o.flags & kAllIgnoredZero;
    args.zero_times_inf = o.flags & kZeroTimesInf;
  }

  ScalarType accum() const { return scalar_type_of(accum_of(args.logits_type)); }

  // Fixes the [outer, classes, inner] view of logits, probabilities and, if there is one, the gradient by one of them.
  void set_layout(const Tensor* grad, bool by_target = false) {
    if (grad) grad_ = *grad;
    auto collapsed = [&] { return try_collapse({&logits, args.soft ? &target : &logits, grad_ ? &*grad_ : &logits}); };
    std::optional<Collapsed> c = collapsed();
    if (!c) {
      logits = torch::stable::contiguous(logits);
      if (args.soft) target = torch::stable::contiguous(target);
      if (grad && !grad->is_contiguous()) {
        grad_ = allocate(*grad, grad->sizes().data(), grad->dim(), grad->scalar_type());
        copy_to_ = *grad;
      }
      c = collapsed();
    }
    args.outer = c->outer;
    args.inner = c->inner;
    args.logits = logits.data_ptr();
    args.logits_strides = c->strides[0];
    if (args.soft) args.target = target.data_ptr();
    args.target_strides = c->strides[1];
    if (!grad) return;
    (by_target ? args.grad_target : args.grad) = grad_->data_ptr();
    (by_target ? args.grad_target_strides : args.grad_strides) = c->strides[2];
  }

  // A tensor with one element per row, in the shape of an index target; `fields` of them.
  Tensor per_row(ScalarType type, int64_t fields = 0) const {
    const auto shape = logits.sizes();
    int64_t sizes[kMaxDims + 1], n = 0;
    if (fields > 0) sizes[n++] = fields;
    for (size_t d = 0; d < shape.size(); ++d)
      if (d != 1) sizes[n++] = shape[d];
    return allocate(logits, sizes, n, type);
  }
  Tensor allocate_loss() {
    const ScalarType type = scalar_type_of(args.loss_type);
    const Tensor loss = args.reduction == Reduction::none ? per_row(type) : allocate_scalar(logits, type);
    args.loss = loss.data_ptr();
    return loss;
  }
  Tensor nothing() const { return allocate(logits, int64_t(0), ScalarType::Float); }

  void set_backward(const Tensor& grad_output, const Tensor& saved) {
    require_vector(saved, "saved", args.saved_count(), accum(), logits);
    args.saved = saved.data_ptr();
    const bool per_row = args.reduction == Reduction::none;
    require_vector(grad_output, "grad_output", per_row ? args.rows() : 1, scalar_type_of(args.loss_type), logits);
    args.grad_output = grad_output.data_ptr();
    args.grad_output_per_row = per_row;
  }

  void forward() {
#if defined(FASTLOSS_HAVE_CUDA)
    if (logits.is_cuda()) return run_cuda(/*backward=*/false);
#endif
    finish(cross_entropy_forward_cpu(args, torch_parallel));
  }
  void backward() {
#if defined(FASTLOSS_HAVE_CUDA)
    if (logits.is_cuda()) return run_cuda(/*backward=*/true);
#endif
    finish(cross_entropy_backward_cpu(args, torch_parallel));
  }

 private:
  void finish(const Status& status) {
    raise_if_failed(status, target, args.all_classes(), args.ignore_index);
    if (copy_to_) torch::stable::copy_(*copy_to_, *grad_);
  }
#if defined(FASTLOSS_HAVE_CUDA)
  void run_cuda(bool backward) {
    CudaCall call(logits);
    const CrossEntropyPlan plan = cross_entropy_plan_cuda(args, call.context(), backward);
    finish(cross_entropy_run_cuda(plan, call.with_workspace(plan.workspace_bytes)));
  }
#endif

  OptionalTensor grad_;     // what the kernel writes
  OptionalTensor copy_to_;  // the gradient itself, where the kernel cannot write it as it lies
};

// Log-sum-exp, arg-max, accuracy and entropy.
struct RowOutputs {
  Tensor lse, argmax, accuracy, entropy;

  explicit RowOutputs(CrossEntropyCall& call)
      : lse(call.per_row(call.accum())),
        argmax(call.per_row(ScalarType::Long)),
        accuracy(allocate_scalar(call.logits, ScalarType::Float)),
        entropy(call.per_row(call.accum())) {
    call.args.lse = lse.data_ptr();
    call.args.argmax = static_cast<int64_t*>(argmax.data_ptr());
    call.args.accuracy = static_cast<float*>(accuracy.data_ptr());
    call.args.entropy = entropy.data_ptr();
  }
  void put(Stack& stack) const {
    for (const Tensor* t : {&lse, &argmax, &accuracy, &entropy}) stack.put(*t);
  }
};

// Loss and gradient of calls that leave the rest at its defaults, for the sake of small ones: the dispatcher takes 0.1
// to 0.3 us for every argument and 1 us for every result.
void plain_grad(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  CrossEntropyCall call(Arguments(stack, Plain()));
  const Tensor grad = allocate_like(call.logits);
  call.set_layout(&grad);
  const Tensor loss = call.allocate_loss();
  call.forward();
  stack.put(loss);
  stack.put(grad);
}
void plain_value(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  CrossEntropyCall call(Arguments(stack, Plain()));
  call.set_layout(nullptr);
  const Tensor loss = call.allocate_loss();
  call.forward();
  stack.put(loss);
}

void value(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  CrossEntropyCall call((Arguments(stack)));
  call.set_layout(nullptr);
  const Tensor loss = call.allocate_loss();
  call.forward();
  stack.put(loss);
}

template <bool kWithOutputs>
void forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Arguments arguments(stack);
  CrossEntropyCall call(arguments);
  const bool wants_grad = arguments.flags & kGrad, saves = arguments.flags & kSave;
  const Tensor grad = wants_grad ? allocate_like(call.logits) : call.nothing();
  call.set_layout(wants_grad ? &grad : nullptr);
  const Tensor loss = call.allocate_loss();
  const Tensor saved = saves ? allocate(call.logits, call.args.saved_count(), call.accum()) : call.nothing();
  if (saves) call.args.saved = saved.data_ptr();
  std::optional<RowOutputs> outputs;
  if constexpr (kWithOutputs) outputs.emplace(call);
  call.forward();
  for (const Tensor* t : {&loss, &saved, &grad}) stack.put(*t);
  if constexpr (kWithOutputs) outputs->put(stack);
}

// The gradient takes the memory of the logits.
void forward_inplace(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Arguments arguments(stack);
  CrossEntropyCall call(arguments);
  call.set_layout(&arguments.logits);
  const Tensor loss = call.allocate_loss();
  std::optional<RowOutputs> outputs;
  if (arguments.flags & kStats) outputs.emplace(call);
  call.forward();
  stack.put(loss);
  if (outputs) return outputs->put(stack);
  for (int i = 0; i < 4; ++i) stack.put(call.nothing());
}

// The gradient by the logits or by the probabilities, of a whole call or of a shard.
template <bool kOfTarget, bool kShard>
void backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor grad_output = stack.take<Tensor>(), saved = stack.take<Tensor>();
  const Range range = kShard ? Range(stack) : Range();
  CrossEntropyCall call(Arguments(stack), range);
  if (kShard && range.total_classes == 0) throw std::invalid_argument("total_classes: expected a positive number");
  if (kOfTarget && !call.args.soft) throw std::invalid_argument("target: class indices have no gradient");
  const Tensor grad = allocate_like(kOfTarget ? call.target : call.logits);
  call.set_layout(&grad, kOfTarget);
  call.set_backward(grad_output, saved);
  call.backward();
  stack.put(grad);
}

// Statistics of the rows over a shard of the classes.
void row_stats(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Range range(stack);
  const Arguments arguments(stack);
  CrossEntropyCall call(arguments, range);
  if (range.total_classes == 0) throw std::invalid_argument("total_classes: expected a positive number");
  call.set_layout(nullptr);
  call.args.stats_best = arguments.flags & kStats;
  const Tensor stats = call.per_row(call.accum(), call.args.stats_count());
  call.args.stats = stats.data_ptr();
  call.forward();
  stack.put(stats);
}

// Which kernel forward takes, in words, for fastloss.explain(). Of the flags, kGrad and kStats matter.
void regime(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Arguments arguments(stack);
  CrossEntropyCall call(arguments);
  call.set_layout(arguments.flags & kGrad ? &call.logits : nullptr);  // a gradient is laid out as dense logits are
#if defined(FASTLOSS_HAVE_CUDA)
  if (call.logits.is_cuda()) {
    CudaCall on_device(call.logits);
    std::optional<RowOutputs> outputs;
    if (arguments.flags & kStats) outputs.emplace(call);
    const CrossEntropyPlan plan = cross_entropy_plan_cuda(call.args, on_device.context(), /*backward=*/false);
    return stack.put(std::string(cross_entropy_regime_cuda(plan)));
  }
#endif
  const std::string isa = isa_name(current_isa());
  stack.put(isa + (takes_row_path(call.args) ? ", row path (vectors along the classes)"
                                             : ", tile path (vectors along the rows)"));
}

std::string row_maps() { return kRowMaps; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  const std::string plain = "Tensor logits, Tensor target, int reduction) -> ";
  const std::string rest =
      "Tensor target, int reduction, int loss_dtype, int flags, Tensor? weight=None, Tensor? sample_weight=None, "
      "Tensor? normalizer=None, int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0, "
      "float logit_scale=1.0, int row_map=0, float[] map_params=[], float[] margins=[]) -> ";
  const std::string call = "Tensor logits, " + rest, range = "int class_offset, int total_classes, ";
  const std::string of_backward = "Tensor grad_output, Tensor saved, ";
  auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("cross_entropy_plain_value(" + plain + "Tensor");
  define("cross_entropy_plain_grad(" + plain + "(Tensor, Tensor)");
  define("cross_entropy_value(" + call + "Tensor");
  define("cross_entropy_forward(" + call + "(Tensor, Tensor, Tensor)");
  define("cross_entropy_forward_stats(" + call + "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("cross_entropy_forward_inplace(Tensor(a!) logits, " + rest + "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("cross_entropy_backward(" + of_backward + call + "Tensor");
  define("cross_entropy_target_backward(" + of_backward + call + "Tensor");
  define("cross_entropy_regime(" + call + "str");
  define("row_stats(" + range + call + "Tensor");
  define("row_gradient(" + of_backward + range + call + "Tensor");
  define("row_target_gradient(" + of_backward + range + call + "Tensor");
  // The row maps in order of their numbers: name:parameter,parameter.
  define("row_maps() -> str");
}

namespace {
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("cross_entropy_plain_value", &plain_value);
  m.impl("cross_entropy_plain_grad", &plain_grad);
  m.impl("cross_entropy_value", &value);
  m.impl("cross_entropy_forward", &forward<false>);
  m.impl("cross_entropy_forward_stats", &forward<true>);
  m.impl("cross_entropy_forward_inplace", &forward_inplace);
  m.impl("cross_entropy_backward", &backward<false, false>);
  m.impl("cross_entropy_target_backward", &backward<true, false>);
  m.impl("cross_entropy_regime", &regime);
  m.impl("row_stats", &row_stats);
  m.impl("row_gradient", &backward<false, true>);
  m.impl("row_target_gradient", &backward<true, true>);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) { m.impl("row_maps", TORCH_BOX(&row_maps)); }
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { register_kernels(m); }
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fastloss
