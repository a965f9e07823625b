// What is raised of an operand outside its domain.
#pragma once
#include <string>

#include "../pointwise/pointwise.h"

namespace fastloss {

// torch's exception, with the value, where it was found, and what to do. The value is given by its bits.
[[noreturn]] void raise_outside_domain(Domain domain, int operand, int64_t value, const std::string& where = "");

}  // namespace fastloss
