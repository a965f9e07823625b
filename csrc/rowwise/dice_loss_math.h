// Dice loss: all that is O(1) per group and class, for CPU and GPU. See dice_loss.h.
#pragma once
#include <math.h>

#include "dice_loss.h"

namespace fastloss {

struct DiceTerm {
  double loss;              // l
  double per_intersection;  // dl/dI
  double per_prediction;    // dl/dP
  double per_target;        // dl/dT
};
// 1 - TI is put together from what is wrong, P - I and T - I: it keeps its digits where all is nearly right. Its power
// has an infinite slope at 0 for gamma < 1; the slope is 0 there, as of a loss that cannot get any smaller.
FASTLOSS_HD DiceTerm tversky_term(const DiceLossArgs& a, double intersection, double prediction, double target) {
  const double wrong = a.alpha * (prediction - intersection) + a.beta * (target - intersection);
  const double area = intersection + wrong + a.smooth_dr, by_size = a.alpha + a.beta;
  const double miss = (wrong + (a.smooth_dr - a.smooth_nr)) / area;
  DiceTerm r = {miss, -(by_size + miss * (1 - by_size)) / area, a.alpha * (1 - miss) / area,
                a.beta * (1 - miss) / area};
  if (a.gamma == 1) return r;
  const double slope = miss <= 0 ? 0 : a.gamma * pow(miss, a.gamma - 1);
  return {miss <= 0 ? 0 : pow(miss, a.gamma), slope * r.per_intersection, slope * r.per_prediction,
          slope * r.per_target};
}
FASTLOSS_HD DiceTerm dice_term(const DiceLossArgs& a, double intersection, double prediction, double target) {
  if (a.skip_absent && target == 0) return {0, 0, 0, 0};
  if (a.tversky) return tversky_term(a, intersection, prediction, target);
  const double area = prediction + target + a.smooth_dr, score = (2 * intersection + a.smooth_nr) / area;
  return {1 - score, -2 / area, score / area, score / area};
}

// The number of losses l of so many groups: what the mean divides by. Where no group counts, the sum is 0, and so is
// the mean.
FASTLOSS_HD double dice_count(const DiceLossArgs& a, int64_t groups) {
  const int64_t classes = a.classes > a.first_class ? a.classes - a.first_class : 0;
  return double((a.groups > 0 && groups == 0 ? 1 : groups) * classes);
}
// The result from the sum of all w_c l.
FASTLOSS_HD double dice_reduced(const DiceLossArgs& a, double sum, double count) {
  return a.lambda_dice * (a.reduction == Reduction::mean ? sum / count : sum);
}
// What is added to it, from the sum over the rows and D.
FASTLOSS_HD double cross_entropy_reduced(const DiceLossArgs& a, double sum, double weights) {
  return a.lambda_ce * (a.reduction == Reduction::mean ? sum / weights : sum);
}
// Where the loss of a group and class is among the results, and its grad_output among those.
FASTLOSS_HD int64_t dice_place(const DiceLossArgs& a, int64_t group, int64_t c) {
  return a.reduction == Reduction::none ? group * (a.classes - a.first_class) + c - a.first_class : 0;
}
FASTLOSS_HD double* dice_divisors(const DiceLossArgs& a) { return a.saved + 3 * a.groups * a.classes; }

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
  const double* saved = a.saved + 3 * (group * a.classes + c);
  const double up = dice_reduced(a, weight * grad_output, dice_divisors(a)[0]);
  const double per_area = up * saved[a.grad_target ? 2 : 1];
  return {T(up * saved[0]), T(a.squared ? 0 : per_area), T(a.squared ? 2 * per_area : 0)};
}

// The gradient of a row's cross entropy by the logit of class c: target w_t (p_c - t_c) + rest (W p_c - w_c), W the sum
// of all weights; of one class t = 1.
template <class T>
struct CrossEntropySlopes {
  T target, rest, all_weights;
};
template <class T>
FASTLOSS_HD CrossEntropySlopes<T> cross_entropy_slopes(const DiceLossArgs& a, double grad_output, double all_weights) {
  const double up = cross_entropy_reduced(a, grad_output, dice_divisors(a)[1]);
  return {T(up * (1 - a.smoothing)), T(up * a.smoothing / double(a.classes)), T(all_weights)};
}
template <class T>
FASTLOSS_HD double dice_weight(const DiceLossArgs& a, int64_t c) {
  return a.weight ? double(static_cast<const T*>(a.weight)[c]) : 1.0;
}

}  // namespace fastloss
