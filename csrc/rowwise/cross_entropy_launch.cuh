// From a launch configuration to one of the instantiated kernels, per dtype of the logits.
#pragma once
#include "cross_entropy_kernels.cuh"

namespace fastloss {

template <class T>
Status launch_cross_entropy(const RowwiseConfig& config, CrossEntropyParams<accum_t<T>> params, void* stream);

namespace launch_detail {

template <class T>
using Kernel = void (*)(CrossEntropyParams<accum_t<T>>);

template <class T, bool kWarpRows, int kN>
Kernel<T> row_kernel_of_pass(Pass pass) {
  switch (pass) {
    case Pass::forward: return cross_entropy_row_kernel<T, false, Pass::forward, kWarpRows, true, kN>;
    case Pass::forward_grad: return cross_entropy_row_kernel<T, false, Pass::forward_grad, kWarpRows, true, kN>;
    default: break;
  }
  // Backward does not need the row as a whole: its parts are smaller.
  return cross_entropy_row_kernel<T, false, Pass::backward, kWarpRows, true, (kN < 8 ? kN : 8)>;
}

template <class T>
Kernel<T> plane_kernel_of_pass(Pass pass) {
  switch (pass) {
    case Pass::forward: return cross_entropy_plane_kernel<T, false, Pass::forward, true>;
    case Pass::forward_grad: return cross_entropy_plane_kernel<T, false, Pass::forward_grad, true>;
    default: return cross_entropy_plane_kernel<T, false, Pass::backward, true>;
  }
}

template <class T>
Kernel<T> tile_kernel_of_pass(Pass pass) {
  switch (pass) {
    case Pass::forward: return cross_entropy_tile_kernel<T, Pass::forward>;
    case Pass::forward_grad: return cross_entropy_tile_kernel<T, Pass::forward_grad>;
    default: return cross_entropy_tile_kernel<T, Pass::backward>;
  }
}

template <class T, int kN>
Kernel<T> column_kernel_of_pass(Pass pass) {
  switch (pass) {
    case Pass::forward: return cross_entropy_column_kernel<T, Pass::forward, kN>;
    case Pass::forward_grad: return cross_entropy_column_kernel<T, Pass::forward_grad, kN>;
    default: return cross_entropy_column_kernel<T, Pass::backward, kN>;
  }
}

// float64 has the general instantiations only.
template <class T>
Kernel<T> kernel_of(const RowwiseConfig& c, Pass pass) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!c.general) {
      switch (c.regime) {
        case Regime::warp_rows:
          return c.vectors == 4 ? row_kernel_of_pass<T, true, 4>(pass) : row_kernel_of_pass<T, true, 8>(pass);
        case Regime::block_rows:
          return c.vectors == 8 ? row_kernel_of_pass<T, false, 8>(pass)
                                : row_kernel_of_pass<T, false, sizeof(T) == 2 ? 12 : 16>(pass);
        case Regime::streaming_rows:
          return pass == Pass::forward ? cross_entropy_row_kernel<T, false, Pass::forward, false, false, 4>
                                       : cross_entropy_row_kernel<T, false, Pass::any, false, false, 4>;
        case Regime::tile: return tile_kernel_of_pass<T>(pass);
        case Regime::column:
          return c.vectors == kFewColumnClasses ? column_kernel_of_pass<T, kFewColumnClasses>(pass)
                                                : column_kernel_of_pass<T, kMaxColumnClasses>(pass);
        case Regime::plane:
          return c.wide ? plane_kernel_of_pass<T>(pass) : cross_entropy_plane_kernel<T, false, Pass::any, false>;
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
    shape.shared =
        PlaneShared<A>::bytes(config.groups, positions, statistics && params.want_q, statistics && params.want_best);
    const int64_t inner_tiles = div_up(params.inner, positions);
    params.outer_step = inner_tiles > 0 ? config.grid / inner_tiles : 0;
    const int64_t chunk = kPlaneClasses * config.groups;
    params.last_base = params.classes > 0 ? (params.classes - 1) / chunk * chunk : -1;
    params.inner_step = inner_tiles > 0 ? config.grid % inner_tiles : 0;
  }
  return launch(launch_detail::kernel_of<T>(config, params.pass), shape, stream, params);
}

}  // namespace fastloss
