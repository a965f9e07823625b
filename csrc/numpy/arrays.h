// numpy arrays as the core sees them: raw pointers, dtypes, strides in elements. numpy has no bfloat16, so a uint16
// array in the place of a floating one holds bfloat16 bits.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../common/types.h"
#include "backend.h"

namespace fastloss {
namespace py = pybind11;

inline DType float_type(const py::array& x, const char* name) {
  const std::string code(1, x.dtype().char_());
  if (code == "f") return DType::f32;
  if (code == "d") return DType::f64;
  if (code == "e") return DType::f16;
  if (code == "H") return DType::bf16;
  throw py::type_error(std::string(name) + ": expected float32, float64, float16 or uint16 (bfloat16 bits), got " +
                       py::str(x.dtype()).cast<std::string>());
}

inline py::dtype numpy_dtype(DType t) {
  return py::dtype(t == DType::f32 ? "float32" : t == DType::f64 ? "float64" : t == DType::f16 ? "float16" : "uint16");
}

inline DType named_type(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw py::value_error("expected float32, float64, float16 or bfloat16, got " + name);
}

inline IndexType index_type(const py::array& x, const char* name) {
  const bool is_signed = x.dtype().kind() == 'i';
  if (is_signed || x.dtype().kind() == 'u') switch (x.itemsize()) {
      case 8: return is_signed ? IndexType::i64 : IndexType::u64;
      case 4: return is_signed ? IndexType::i32 : IndexType::u32;
      case 2: return is_signed ? IndexType::i16 : IndexType::u16;
      case 1: return is_signed ? IndexType::i8 : IndexType::u8;
    }
  throw py::type_error(std::string(name) + ": expected an integer dtype, got " +
                       py::str(x.dtype()).cast<std::string>());
}

inline Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  throw py::value_error("reduction: expected none, mean or sum, got " + name);
}

// [outer, classes] or [outer, classes, inner], any strides.
inline Strides strides_of(const py::array& x, const char* name) {
  if (x.ndim() != 2 && x.ndim() != 3)
    throw py::value_error(std::string(name) + ": expected shape [outer, classes] or [outer, classes, inner]");
  for (py::ssize_t i = 0; i < x.ndim(); ++i)
    if (x.strides(i) % x.itemsize() != 0) throw py::value_error(std::string(name) + ": strides between elements");
  return {x.strides(0) / x.itemsize(), x.strides(1) / x.itemsize(), x.ndim() == 3 ? x.strides(2) / x.itemsize() : 0};
}

template <class Args>
void set_shape(Args& a, const py::array& x) {
  a.outer = x.shape(0);
  a.classes = x.shape(1);
  a.inner = x.ndim() == 3 ? x.shape(2) : 1;
}

inline void require_shape_of(const py::array& x, const py::array& like, const char* name) {
  if (x.ndim() != like.ndim() || !std::equal(x.shape(), x.shape() + x.ndim(), like.shape()))
    throw py::value_error(std::string(name) + ": its shape is not that of the input");
}

// A contiguous array of `count` elements of type `t`, or null for None.
inline const void* flat_input(const py::object& x, py::ssize_t count, const py::dtype& t, const char* name) {
  if (x.is_none()) return nullptr;
  const py::array array = x.cast<py::array>();
  if (!array.dtype().is(t) || array.size() != count || !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected a contiguous array of " + std::to_string(count) + " " +
                          py::str(t).cast<std::string>());
  return array.data();
}

// A result that the caller may leave out (None or False), have allocated (True) or provide (an array).
class Output {
 public:
  Output(const py::object& wanted, const py::dtype& t, std::vector<py::ssize_t> shape, const char* name) {
    if (wanted.is_none() || wanted.is(py::bool_(false))) return;
    array_ = wanted.is(py::bool_(true)) ? py::array(t, shape) : wanted.cast<py::array>();
    if (!array_.dtype().is(t) || array_.ndim() != py::ssize_t(shape.size()) ||
        !std::equal(shape.begin(), shape.end(), array_.shape()))
      throw py::value_error(std::string(name) + ": wrong dtype or shape of the array to write to");
    data_ = array_.mutable_data();  // throws for a read-only array
    is_wanted_ = true;
  }
  Output& contiguous(const char* name) {
    if (is_wanted_ && !(array_.flags() & py::array::c_style))
      throw py::value_error(std::string(name) + ": expected a contiguous array");
    return *this;
  }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  Strides strides(const char* name) const { return is_wanted_ ? strides_of(array_, name) : Strides{}; }
  void put(py::dict& results, const char* name) const {
    if (is_wanted_) results[name] = array_;
  }

 private:
  py::array array_;
  void* data_ = nullptr;
  bool is_wanted_ = false;
};

// Runs a core function without the GIL; a bad target becomes IndexError(message, row, value).
template <class F>
void run_core(const F& f) {
  Status status;
  {
    py::gil_scoped_release released;
    status = f();
  }
  if (status.code == Status::bad_target) {
    const std::string message =
        "target " + std::to_string(status.value) + " at row " + std::to_string(status.row) + " is out of bounds";
    PyErr_SetObject(PyExc_IndexError, py::make_tuple(message, status.row, status.value).ptr());
    throw py::error_already_set();
  }
  if (status.code != Status::ok) throw std::runtime_error(failure_message(status));
}

// The functions of a module, by the file that defines them: <what>_numpy.cpp.
void bind_cross_entropy(py::module_& m);
void bind_row_loss(py::module_& m);
void bind_dice_loss(py::module_& m);
void bind_divergence(py::module_& m);
void bind_token_log_probs(py::module_& m);
void bind_pointwise(py::module_& m);
void bind_scale_grad(py::module_& m);
void bind_policy(py::module_& m);

}  // namespace fastloss
