// All pointwise losses, for who calls them by number. Included with FASTLOSS_ISA, as loss.h is.
#pragma once
#include <utility>

#include "losses/classification.h"
#include "losses/distributions.h"
#include "losses/multilabel.h"
#include "losses/regression.h"
#include "losses/vectors.h"

namespace fastloss {
namespace FASTLOSS_ISA {

template <class... L>
constexpr int count_of(LossList<L...>) {
  return int(sizeof...(L));
}

// The losses of the groups, in the order of their numbers; ends with a name of null.
template <int... kGroups>
struct Registry {
  PointwiseLoss all[(count_of(typename LossesOf<LossGroup(kGroups)>::type{}) + ... + 1)] = {};

  constexpr Registry() {
    PointwiseLoss* to = all;
    (add(to, LossGroup(kGroups), typename LossesOf<LossGroup(kGroups)>::type{}), ...);
  }

 private:
  template <class... L>
  static constexpr void add(PointwiseLoss*& to, LossGroup group, LossList<L...>) {
    int number = 0;
    ((*to++ = {L::name,
               group,
               number++,
               L::operands,
               L::sums,
               L::params,
               L::finishes,
               L::streams,
               L::checks,
               {L::domain(0), L::domain(1), L::domain(2), L::domain(3)}}),
     ...);
  }
};
template <int... kGroups>
const PointwiseLoss* registry(std::integer_sequence<int, kGroups...>) {
  static constexpr Registry<kGroups...> losses;
  return losses.all;
}
inline const PointwiseLoss* registry() { return registry(std::make_integer_sequence<int, kLossGroups>{}); }

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
