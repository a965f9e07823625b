// rowwise_config, the launch policy of the CUDA kernels, for sweeps over shapes and devices.
#include <pybind11/stl.h>

#include <array>

#include "../rowwise/cross_entropy_policy.h"
#include "arrays.h"

namespace fastloss {
namespace {

Pass pass_of(const std::string& name) {
  if (name == "forward") return Pass::forward;
  if (name == "forward_grad") return Pass::forward_grad;
  if (name == "backward") return Pass::backward;
  throw py::value_error("expected forward, forward_grad or backward, got " + name);
}

const char* name_of(Regime regime) {
  switch (regime) {
    case Regime::warp_rows: return "warp_rows";
    case Regime::block_rows: return "block_rows";
    case Regime::streaming_rows: return "streaming_rows";
    case Regime::tile: return "tile";
    case Regime::column: return "column";
    case Regime::plane: return "plane";
  }
  return "";
}

}  // namespace

void bind_policy(py::module_& m) {
  using strides_t = std::array<int64_t, 3>;
  m.def(
      "rowwise_config",
      [](int64_t outer, int64_t classes, int64_t inner, int element_bytes, const strides_t& logits,
         const std::optional<strides_t>& grad, int logits_offset, int grad_offset, bool in_place, bool general,
         const std::string& pass, int multiprocessors, int max_cluster) {
        RowwiseProblem p;
        p.outer = outer;
        p.classes = classes;
        p.inner = inner;
        p.element_bytes = element_bytes;
        p.logits = {logits[0], logits[1], logits[2]};
        if (grad) p.grad = {(*grad)[0], (*grad)[1], (*grad)[2]};
        p.has_grad = grad.has_value();
        p.logits_offset = logits_offset;
        p.grad_offset = grad_offset;
        p.in_place = in_place;
        p.general = general;
        p.pass = pass_of(pass);
        DeviceProperties device;
        device.multiprocessors = multiprocessors;
        device.max_cluster = max_cluster;
        const RowwiseConfig c = rowwise_config(p, device);
        py::dict d;
        d["regime"] = name_of(c.regime);
        d["general"] = c.general;
        d["wide"] = c.wide;
        d["vectors"] = c.vectors;
        d["lanes"] = c.lanes;
        d["parts"] = c.parts;
        d["cluster"] = c.cluster;
        d["slice"] = c.slice;
        d["groups"] = c.groups;
        d["threads"] = c.threads;
        d["grid"] = c.grid;
        return d;
      },
      py::arg("outer"), py::arg("classes"), py::arg("inner") = 1, py::kw_only(), py::arg("element_bytes"),
      py::arg("logits"), py::arg("grad") = py::none(), py::arg("logits_offset") = 0, py::arg("grad_offset") = 0,
      py::arg("in_place") = false, py::arg("general") = false, py::arg("pass_"), py::arg("multiprocessors"),
      py::arg("max_cluster"),
      "The launch of a problem whose axes have been merged; strides are (outer, class, inner).");
}

}  // namespace fastloss
