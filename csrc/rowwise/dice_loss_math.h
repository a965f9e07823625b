// Dice loss: all that is O(1) per group and class, for CPU and GPU. See dice_loss.h.
#pragma once
#include "dice_loss.h"

namespace fastloss {

struct DiceTerm {
  double loss;              // l
  double per_intersection;  // dl/dI
  double per_area;          // dl/dP = dl/dT
};
FASTLOSS_HD DiceTerm dice_term(const DiceLossArgs& a, double intersection, double prediction, double target) {
  if (a.skip_absent && target == 0) return {0, 0, 0};
  const double area = prediction + target + a.smooth_dr, score = (2 * intersection + a.smooth_nr) / area;
  return {1 - score, -2 / area, score / area};
}

// The number of losses l.
FASTLOSS_HD int64_t dice_count(const DiceLossArgs& a) {
  return a.classes > a.first_class ? a.groups * (a.classes - a.first_class) : 0;
}
// The result from the sum of all w_c l.
FASTLOSS_HD double dice_reduced(const DiceLossArgs& a, double sum) {
  return a.reduction == Reduction::mean ? sum / double(dice_count(a)) : sum;
}
// Where the loss of a group and class is among the results, and its grad_output among those.
FASTLOSS_HD int64_t dice_place(const DiceLossArgs& a, int64_t group, int64_t c) {
  return a.reduction == Reduction::none ? group * (a.classes - a.first_class) + c - a.first_class : 0;
}

// What the gradients of a class are made of: dL/dp = by_other t + constant + by_own p, and dL/dt with p and t changed
// over.
template <class T>
struct DiceSlopes {
  T by_other, constant, by_own;
};
template <class T>
FASTLOSS_HD DiceSlopes<T> dice_slopes(const DiceLossArgs& a, int64_t group, int64_t c, double weight,
                                      double grad_output) {
  if (c < a.first_class) return {T(0), T(0), T(0)};
  const double* saved = a.saved + 2 * (group * a.classes + c);
  const double up = dice_reduced(a, weight * grad_output), per_area = up * saved[1];
  return {T(up * saved[0]), T(a.squared ? 0 : per_area), T(a.squared ? 2 * per_area : 0)};
}

}  // namespace fastloss
