// From a launch configuration to one of the instantiated kernels, per dtype of the logits.
#pragma once
#include "cross_entropy_kernels.cuh"

namespace fastloss {

namespace launch_detail {

template <class T>
using Kernel = void (*)(CrossEntropyParams<accum_t<T>>);

// f(constant pass): the kernel made for it.
template <class F>
auto kernel_of_pass(Pass pass, const F& f) {
  switch (pass) {
    case Pass::forward: return f(std::integral_constant<Pass, Pass::forward>{});
    case Pass::forward_grad: return f(std::integral_constant<Pass, Pass::forward_grad>{});
    default: return f(std::integral_constant<Pass, Pass::backward>{});
  }
}

template <class T, bool kWarpRows, int kN>
Kernel<T> row_kernel_of(Pass pass) {
  return kernel_of_pass(pass, [](auto of) -> Kernel<T> {
    constexpr Pass kPass = of.value;
    // Backward does not need the row as a whole: its parts are smaller.
    constexpr int kVectors = kPass == Pass::backward && kN > 8 ? 8 : kN;
    return cross_entropy_row_kernel<T, false, kPass, kWarpRows, true, kVectors>;
  });
}

// float64 has the general instantiations only.
template <class T>
Kernel<T> kernel_of(const RowwiseConfig& c, Pass pass) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!c.general) {
      switch (c.regime) {
        case Regime::warp_rows:
          return c.vectors == 4 ? row_kernel_of<T, true, 4>(pass) : row_kernel_of<T, true, 8>(pass);
        case Regime::block_rows:
          return c.vectors == 8 ? row_kernel_of<T, false, 8>(pass)
                                : row_kernel_of<T, false, sizeof(T) == 2 ? 12 : 16>(pass);
        case Regime::streaming_rows:
          return pass == Pass::forward ? cross_entropy_row_kernel<T, false, Pass::forward, false, false, 4>
                                       : cross_entropy_row_kernel<T, false, Pass::any, false, false, 4>;
        case Regime::tile:
          return kernel_of_pass(pass, [](auto of) -> Kernel<T> { return cross_entropy_tile_kernel<T, of.value>; });
        case Regime::column:
          return kernel_of_pass(pass, [&](auto of) -> Kernel<T> {
            return c.vectors == kFewColumnClasses ? cross_entropy_column_kernel<T, of.value, kFewColumnClasses>
                                                  : cross_entropy_column_kernel<T, of.value, kMaxColumnClasses>;
          });
        case Regime::plane:
          if (!c.wide) return cross_entropy_plane_kernel<T, false, Pass::any, false>;
          return kernel_of_pass(
              pass, [](auto of) -> Kernel<T> { return cross_entropy_plane_kernel<T, false, of.value, true>; });
      }
    }
  }
  constexpr int kStreamed = std::is_same_v<T, float> ? 1 : 2;
  switch (c.regime) {
    case Regime::warp_rows: return cross_entropy_row_kernel<T, true, Pass::any, true, true, 4>;
    case Regime::block_rows: return cross_entropy_row_kernel<T, true, Pass::any, false, true, 4>;
    case Regime::streaming_rows: return cross_entropy_row_kernel<T, true, Pass::any, false, false, kStreamed>;
    default: break;
  }
  if constexpr (sizeof(T) < 8)
    if (c.wide) return cross_entropy_plane_kernel<T, true, Pass::any, true>;
  return cross_entropy_plane_kernel<T, true, Pass::any, false>;
}

}  // namespace launch_detail

template <class T>
Status launch_cross_entropy(const RowwiseConfig& config, CrossEntropyParams<accum_t<T>> params, void* stream) {
  using A = accum_t<T>;
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = config.threads;
  shape.cluster = config.cluster ? config.parts : 1;
  shape.shared = static_cast<int>(sizeof(RowShared<A>));
  if (config.regime == Regime::streaming_rows) {
    const int64_t chunk = int64_t(config.vectors) * config.threads;
    params.last_base = (config.slice - 1) / chunk * chunk;
  }
  if (config.regime == Regime::tile)
    shape.shared = kTileScratchBytes + config.threads / config.lanes * static_cast<int>(params.classes * sizeof(T));
  if (config.regime == Regime::plane) {
    const bool statistics = params.pass != Pass::backward;
    const int positions = kWarp * (config.wide ? 8 / static_cast<int>(sizeof(T)) : 1);
    shape.shared = PlaneShared<A>::bytes(config.groups, positions, statistics && (params.want_q || params.want_entropy),
                                         statistics && params.want_best);
    const int64_t inner_tiles = div_up(params.inner, positions);
    params.outer_step = inner_tiles > 0 ? config.grid / inner_tiles : 0;
    const int64_t chunk = kPlaneClasses * config.groups;
    params.last_base = params.classes > 0 ? (params.classes - 1) / chunk * chunk : -1;
    params.inner_step = inner_tiles > 0 ? config.grid % inner_tiles : 0;
  }
  return launch(launch_detail::kernel_of<T>(config, params.pass), shape, stream, params);
}

// Instantiated in cross_entropy_cuda_<dtype>.cu.
extern template Status launch_cross_entropy<float>(const RowwiseConfig&, CrossEntropyParams<float>, void*);
extern template Status launch_cross_entropy<double>(const RowwiseConfig&, CrossEntropyParams<double>, void*);
extern template Status launch_cross_entropy<half_t>(const RowwiseConfig&, CrossEntropyParams<float>, void*);
extern template Status launch_cross_entropy<bfloat16_t>(const RowwiseConfig&, CrossEntropyParams<float>, void*);

// At most `wanted` blocks, as many as a cluster of the largest row kernel can have on the current device.
int largest_row_cluster(int wanted);

}  // namespace fastloss
