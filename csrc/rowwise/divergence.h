// Divergences of two softmaxes, from their logits: the contract between the bindings and the kernels.
//
// Logits of p and of q are seen as x[outer, classes, inner], rows as in cross_entropy.h. With p = softmax(x_p / T),
// q = softmax(x_q / T) and m = beta p + (1 - beta) q, a row's divergence D_r is
//
//   kl  sum_c p_c log(p_c / q_c)
//   js  beta sum_c p_c log(p_c / m_c) + (1 - beta) sum_c q_c log(q_c / m_c)
//
// A class whose probability is 0 adds nothing to the sum that it weighs, whatever the other says of it. With s the
// scale (1, or T^2), w_r the weight of a row and W what a mean divides by:
//
//   none  L_r = s w_r D_r      sum  L = s sum_r w_r D_r      mean  L = s sum_r w_r D_r / W
//
//   dL/dx_p = u p_c (log(p_c / q_c) - D_r)                        dL/dx_q = u (q_c - p_c)                         of kl
//   dL/dx_p = u beta p_c (log(p_c / m_c) - sum p log(p / m))      and the same of q with 1 - beta                 of js
//
// with u = grad_output s w_r / (W T). A row of weight 0 has loss 0 and gradient 0, and its logits are not read.
//
// Fewest bytes: two reads, and a write for each gradient that is wanted. Logits and gradients may be of any floating
// dtype each; what is computed is in float64 where one of the logits is, else in float32.
#pragma once
#include "../common/types.h"

namespace fastloss {

enum class Divergence : int32_t { kl = 0, js = 1 };

struct DivergenceOperand {
  const void* logits = nullptr;  // [outer, classes, inner] of type
  DType type = DType::f32;
  Strides strides;
  void* grad = nullptr;  // the same of the same type; null: not wanted
  Strides grad_strides;
};

struct DivergenceArgs {
  Divergence kind = Divergence::kl;
  double beta = 0.5;  // of js; inside (0, 1) as a float, too
  double temperature = 1, scale = 1;
  int64_t outer = 0, classes = 0, inner = 1;
  DivergenceOperand p, q;
  const void* weight = nullptr;  // [rows] contiguous, accum(); null: ones
  const void* total = nullptr;   // [] accum(): W; null: the number of rows
  Reduction reduction = Reduction::mean;
  DType loss_type = DType::f32;  // of loss and grad_output

  // ---- forward: the loss, and the gradients for a grad_output of 1 where there is a place for them
  void* loss = nullptr;   // [] or [rows]
  void* saved = nullptr;  // [kDivergenceSaved, rows] accum(): what backward needs; forward: null: not wanted

  // ---- backward
  const void* grad_output = nullptr;  // [] or [rows]
  bool grad_output_per_row = false;

  constexpr int64_t rows() const { return outer * inner; }
  constexpr DType accum() const { return p.type == DType::f64 || q.type == DType::f64 ? DType::f64 : DType::f32; }
};

// The fields of PairRow in divergence_math.h, then the sums that the two gradients lack.
constexpr int kDivergenceSaved = 7;

Status divergence_forward_cpu(const DivergenceArgs& a, ParallelFor parallel_for);
Status divergence_backward_cpu(const DivergenceArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
