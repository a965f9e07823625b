// The row losses: what each is, once for the CPU and the GPU. A loss f(x, t) is made of terms of every class but the
// target's, which are summed, and of a formula after the sums:
//
//   S = sum over c != t of terms(x_c, x_t),   f = finish(S, x_t, classes).value
//   df/dx_t = finish(...).at_target,   df/dx_c = finish(...).factor slope(x_c, x_t) for the others
//
// T is float or double; sums, and what comes after them, are double. A loss without sums depends on x_t alone.
//
// A new loss is a struct here and its name in `RowLosses`; CONTRIBUTING.md goes through the steps.
#pragma once
#include "row_loss.h"

namespace fastloss {

// The numbers that a loss takes.
template <class T>
struct RowParams {
  T at[kRowLossParams];
  constexpr T operator[](int i) const { return at[i]; }
};
template <class T>
constexpr RowParams<T> row_params(const RowLossArgs& a) {
  return {{T(a.params[0]), T(a.params[1]), T(a.params[2]), T(a.params[3])}};
}

template <class T, int kSums>
struct RowTerms {
  T value[kSums];
};
struct FinishedRow {
  double value, at_target, factor;
};

// What a loss may say of itself. `linear`: its gradient is known without the elements; only where there are no sums.
struct PlainRowLoss {
  static constexpr int sums = 0, params = 0;
  static constexpr bool linear = false;
};

// -x_t
struct NllLoss : PlainRowLoss {
  static constexpr const char* name = "nll_loss";
  static constexpr bool linear = true;
  static constexpr FinishedRow finish(const double*, double x_t, double, const RowParams<double>&) {
    return {-x_t, -1, 0};
  }
};

// sum over c != t of max(0, m - x_t + x_c)^p / classes; p = p[0], 1 or 2; m = p[1]
struct MultiMarginLoss : PlainRowLoss {
  static constexpr const char* name = "multi_margin_loss";
  static constexpr int sums = 2, params = 2;
  template <class T>
  static constexpr T slope(T x, T x_t, const RowParams<T>& p) {
    const T z = p[1] - x_t + x;
    return z > T(0) ? (p[0] == T(1) ? T(1) : z + z) : T(0);
  }
  template <class T>
  static constexpr RowTerms<T, 2> terms(T x, T x_t, const RowParams<T>& p) {
    const T z = p[1] - x_t + x;
    return {{z > T(0) ? (p[0] == T(1) ? z : z * z) : T(0), slope(x, x_t, p)}};
  }
  static constexpr FinishedRow finish(const double* s, double, double classes, const RowParams<double>&) {
    return {s[0] / classes, -s[1] / classes, 1 / classes};
  }
};

// max(0, m+ - x_t)^2 + w sum over c != t of max(0, x_c - m-)^2; m+ = p[0], m- = p[1], w = p[2]
struct CapsuleMarginLoss : PlainRowLoss {
  static constexpr const char* name = "capsule_margin_loss";
  static constexpr int sums = 1, params = 3;
  template <class T>
  static constexpr RowTerms<T, 1> terms(T x, T, const RowParams<T>& p) {
    const T z = x - p[1];
    return {{z < T(0) ? T(0) : z * z}};
  }
  template <class T>
  static constexpr T slope(T x, T, const RowParams<T>& p) {
    const T z = x - p[1];
    return z < T(0) ? T(0) : z + z;
  }
  static constexpr FinishedRow finish(const double* s, double x_t, double, const RowParams<double>& p) {
    const double z = p[0] - x_t, below = z < 0 ? 0 : z;
    return {below * below + p[2] * s[0], -2 * below, p[2]};
  }
};

template <class... L>
struct RowLossList {};
using RowLosses = RowLossList<  // the registry; a loss's number is its place here
    NllLoss, MultiMarginLoss, CapsuleMarginLoss>;

// What a loss is to those who call it by number.
struct RowLoss {
  const char* name;
  int sums, params;
  bool linear;
};
template <class... L>
const RowLoss* row_loss_list(RowLossList<L...>) {
  static constexpr RowLoss all[] = {{L::name, L::sums, L::params, L::linear}..., {}};
  return all;
}
// In the order of their numbers; ends with a name of null.
inline const RowLoss* row_losses() { return row_loss_list(RowLosses{}); }

// f(Loss{}) for number `id` of the list.
template <class F, class First, class... Rest>
void with_row_loss(RowLossList<First, Rest...>, int id, const F& f) {
  if (id == 0) return f(First{});
  if constexpr (sizeof...(Rest) > 0) with_row_loss(RowLossList<Rest...>{}, id - 1, f);
}

}  // namespace fastloss
