"""What every loss is, composed of torch operations.

Second and higher derivatives and those of forward mode are torch's of these formulas (:mod:`fastloss._autograd`); tests
and benchmarks hold the kernels to them as well. A formula is exact where it is smooth; at kinks its slope is that of
the kernels, 0 for ``|d|`` at 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import Grads, Needs, Tensors, accum_dtype
from ._library import DTYPES, MEAN, NONE, ops

# ----------------------------------------------------------------------------------------------------- pointwise losses


class Formula(NamedTuple):
    """A pointwise loss.

    Attributes:
        terms: what is summed, ``terms(*operands, ***parameters)``: each element's loss, or a tuple for several sums.
        parameters: their names, in the kernels' order.
        finish: what is made of the sums (or means) over a row, ``finish(*sums, ***parameters)``; None: the sum itself.
        wide: taken in float64, where squares of float32 neither overflow nor vanish.
    """

    terms: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    finish: Callable[..., Tensor] | None = None
    wide: bool = False


def l1_loss(x: Tensor, t: Tensor) -> Tensor:
    """|x - t|"""
    return (x - t).abs()


def mse_loss(x: Tensor, t: Tensor) -> Tensor:
    """(x - t)^2"""
    return (x - t) ** 2


def smooth_l1_loss(x: Tensor, t: Tensor, beta: float = 1.0) -> Tensor:
    """(x - t)^2 / 2 beta below beta, |x - t| - beta/2 beyond."""
    d = x - t
    a = d.abs()  # not what is squared: its slope at 0 would take the second derivative away there
    return torch.where(a < beta, 0.5 * d**2 / beta, a - 0.5 * beta) if beta else a


def huber_loss(x: Tensor, t: Tensor, delta: float = 1.0) -> Tensor:
    """(x - t)^2 / 2 up to delta, delta (|x - t| - delta/2) beyond."""
    d = x - t
    a = d.abs()
    return torch.where(a <= delta, 0.5 * d**2, delta * (a - 0.5 * delta))


def smooth_l1_loss_of_betas(x: Tensor, t: Tensor, beta: Tensor) -> Tensor:
    """:func:`smooth_l1_loss` with a beta for each element; nan where that is negative."""
    d = x - t
    near, a = d.abs() < beta, d.abs()
    square = torch.where(near, d, 0.0) ** 2 / torch.where(near, beta, 1.0)
    return torch.where(near, 0.5 * square, torch.where(beta < 0, torch.nan, a - 0.5 * beta))


def huber_loss_of_deltas(x: Tensor, t: Tensor, delta: Tensor) -> Tensor:
    """:func:`huber_loss` with a delta for each element; nan where that is not positive."""
    d = x - t
    near, a = d.abs() <= delta, d.abs()
    square = torch.where(near, d, 0.0) ** 2
    return torch.where(delta > 0, torch.where(near, 0.5 * square, delta * (a - 0.5 * delta)), torch.nan)


def log_cosh_loss(x: Tensor, t: Tensor) -> Tensor:
    """log cosh (x - t), as log1p(2 sinh((x - t) / 2)^2), which keeps small residuals, and |x - t| - log 2 far away."""
    d = x - t
    a = d.abs()
    near = a < 20.0
    return torch.where(near, torch.log1p(2 * (torch.where(near, d, 0.0) / 2).sinh() ** 2), a - 0.6931471805599453)


def _at_least(x: Tensor, least: float) -> Tensor:
    """max(x, least), with derivative 0 at a tie, where that of torch's clamp depends on torch's version."""
    return torch.where(x <= least, least, x)


def _hinge(x: Tensor) -> Tensor:
    """max(0, x), with derivative 1 at 0."""
    return torch.where(x < 0, 0.0, x)


def relative_l1_loss(x: Tensor, t: Tensor, eps: float = 0.0, symmetric: bool = False) -> Tensor:
    """|x - t| / max(|t|, eps), or / max((|x| + |t|) / 2, eps)."""
    scale = (x.abs() + t.abs()) / 2 if symmetric else t.abs()
    return (x - t).abs() / _at_least(scale, eps)


def binary_cross_entropy_with_logits(
    x: Tensor, t: Tensor, pos_weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """pw t softplus(-x) + (1 - t) softplus(x), with t moved towards 1/2 by the smoothing."""
    t = t * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else t
    log_weight = 1.0 if pos_weight is None else (pos_weight - 1) * t + 1
    return (1 - t) * x + log_weight * F.softplus(-x)


def binary_cross_entropy(x: Tensor, t: Tensor) -> Tensor:
    """-t max(log x, -100) - (1 - t) max(log(1 - x), -100); at 0 and 1 without a slope."""
    none, all = x == 0, x == 1
    log_x = torch.where(none, -100.0, torch.where(none, 1.0, x).log().clamp(min=-100.0))
    log_rest = torch.where(all, -100.0, torch.log1p(-torch.where(all, 0.0, x)).clamp(min=-100.0))
    return (t - 1) * log_rest - t * log_x


def soft_margin_loss(x: Tensor, t: Tensor) -> Tensor:
    """log(1 + e^(-t x))"""
    return F.softplus(-t * x)


def hinge_embedding_loss(x: Tensor, t: Tensor, margin: float = 1.0) -> Tensor:
    """x for t = 1, max(0, margin - x) for t = -1."""
    return torch.where(t != 1, _hinge(margin - x), 0.0) + torch.where(t != -1, x, 0.0)


def margin_ranking_loss(x: Tensor, y: Tensor, t: Tensor, margin: float = 0.0) -> Tensor:
    """max(0, margin - t (x - y))"""
    return _hinge(margin - t * (x - y))


def gaussian_nll_loss(x: Tensor, t: Tensor, var: Tensor, eps: float = 1e-6, full: bool = False) -> Tensor:
    """(log v + (x - t)^2 / v) / 2, v = max(var, eps), differentiated as if v were var."""
    v = torch.where(var < eps, var - var.detach() + eps, var)
    return 0.5 * (v.log() + (x - t) ** 2 / v) + (0.5 * math.log(2 * math.pi) if full else 0.0)


def poisson_nll_loss(x: Tensor, t: Tensor, log_input: bool = True, full: bool = False, eps: float = 1e-8) -> Tensor:
    """e^x - t x, or x - t log(x + eps); with Stirling's log t! where t > 1."""
    loss = x.exp() - t * x if log_input else x - t * (x + eps).log()
    if not full:
        return loss
    large = t > 1
    s = torch.where(large, t, 1.0)
    return loss + torch.where(large, s * s.log() - s + 0.5 * (2 * math.pi * s).log(), 0.0)


def kl_div(x: Tensor, t: Tensor, log_target: bool = False, share: float = 1.0) -> Tensor:
    """share t (log t - x), or share e^t (t - x)"""
    return share * (t.exp() * (t - x) if log_target else torch.xlogy(t, t) - t * x)


def root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _power(x: Tensor, p: float) -> Tensor:
    """x^p for x >= 0, with derivative 0 at 0."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x) ** p)


def _cosine_terms(x: Tensor, t: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return x * t, x * x, t * t


def _cosine_finish(product: Tensor, x_square: Tensor, t_square: Tensor, eps: float = 0.0) -> Tensor:
    return 1 - product / _at_least(root(x_square) * root(t_square), eps)


def _cosine_embedding_terms(
    x: Tensor, y: Tensor, t: Tensor, margin: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x * y, x * x, y * y, torch.where(t == 1, 1.0, torch.where(t == -1, -1.0, 0.0)).to(x.dtype)


def _cosine_embedding_finish(
    product: Tensor, x_square: Tensor, y_square: Tensor, side: Tensor, margin: float = 0.0
) -> Tensor:
    cosine = product / ((x_square + 1e-12).sqrt() * (y_square + 1e-12).sqrt())
    return torch.where(side > 0, 1 - cosine, torch.where(side < 0, _hinge(cosine - margin), 0.0))


def _triplet_terms(
    a: Tensor, p: Tensor, n: Tensor, norm: float = 2.0, margin: float = 1.0, eps: float = 1e-6, swap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    ap, an, pn = (d**2 if norm == 2 else _power(d.abs(), norm) for d in (a - p + eps, a - n + eps, p - n + eps))
    return ap, an, pn


def _triplet_finish(
    ap: Tensor, an: Tensor, pn: Tensor, norm: float = 2.0, margin: float = 1.0, eps: float = 1e-6, swap: float = 0.0
) -> Tensor:
    near, far, other = (_power(s, 1 / norm) for s in (ap, an, pn))
    return _hinge(margin + near - (torch.minimum(far, other) if swap else far))


def charbonnier_loss(x: Tensor, t: Tensor, eps: float = 1e-3) -> Tensor:
    """sqrt((x - t)^2 + eps^2)"""
    return ((x - t) ** 2 + eps**2).sqrt()


def quantile_loss(x: Tensor, t: Tensor, q: Any = 0.5) -> Tensor:
    """q (t - x) above, (1 - q) (x - t) below; q a number, or a tensor of them."""
    d = t - x
    return torch.where(d > 0, q * d, torch.where(d < 0, (q - 1) * d, d * 0.0))


def rmsle_loss(x: Tensor, t: Tensor) -> Tensor:
    """(log1p x - log1p t)^2; nan from -1 on down."""
    x, t = (torch.where(v > -1, v, torch.nan).log1p() for v in (x, t))
    return (x - t) ** 2


def _focus(w: Tensor, gamma: float) -> Any:
    """w^gamma"""
    return _power(w, gamma) if gamma else 1.0


def sigmoid_focal_loss(x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """alpha_t (1 - p_t)^gamma times binary cross entropy."""
    cross_entropy = t * F.softplus(-x) + (1 - t) * F.softplus(x)
    share = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
    return share * _focus(t * torch.sigmoid(-x) + (1 - t) * torch.sigmoid(x), gamma) * cross_entropy


def asymmetric_loss(x: Tensor, t: Tensor, gamma_pos: float = 1.0, gamma_neg: float = 4.0, clip: float = 0.05) -> Tensor:
    """-t (1 - p)^gamma_pos log p - (1 - t) m^gamma_neg log(1 - m), m = max(p - clip, 0)."""
    m, cost = torch.sigmoid(x), F.softplus(x)
    if clip:
        m = torch.where(m > clip, m - clip, 0.0)
        cost = -torch.log1p(-m)
    return t * _focus(torch.sigmoid(-x), gamma_pos) * F.softplus(-x) + (1 - t) * _focus(m, gamma_neg) * cost


def capsule_margin_loss(
    x: Tensor, t: Tensor, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5
) -> Tensor:
    """t max(0, m_plus - x)^2 + down_weight (1 - t) max(0, x - m_minus)^2"""
    return t * (m_plus - x).clamp(min=0) ** 2 + down_weight * (1 - t) * (x - m_minus).clamp(min=0) ** 2


FORMULAS: dict[str, Formula] = {
    "l1_loss": Formula(l1_loss),
    "mse_loss": Formula(mse_loss),
    "rmse_loss": Formula(lambda x, t, eps: (x - t) ** 2, ("eps",), lambda square, eps: root(square + eps), wide=True),
    "smooth_l1_loss": Formula(smooth_l1_loss, ("beta",)),
    "huber_loss": Formula(huber_loss, ("delta",)),
    "log_cosh_loss": Formula(log_cosh_loss),
    "relative_l1_loss": Formula(relative_l1_loss, ("eps", "symmetric")),
    "binary_cross_entropy_with_logits": Formula(binary_cross_entropy_with_logits, ("label_smoothing",)),
    "binary_cross_entropy": Formula(binary_cross_entropy),
    "soft_margin_loss": Formula(soft_margin_loss),
    "hinge_embedding_loss": Formula(hinge_embedding_loss, ("margin",)),
    "margin_ranking_loss": Formula(margin_ranking_loss, ("margin",)),
    "gaussian_nll_loss": Formula(gaussian_nll_loss, ("eps", "full")),
    "poisson_nll_loss": Formula(poisson_nll_loss, ("log_input", "full", "eps")),
    "kl_div": Formula(kl_div, ("log_target", "share")),
    "cosine_distance_loss": Formula(_cosine_terms, ("eps",), _cosine_finish),
    "charbonnier_loss": Formula(charbonnier_loss, ("eps",)),
    "quantile_loss": Formula(quantile_loss, ("q",)),
    "quantiles_loss": Formula(quantile_loss),
    "rmsle_loss": Formula(rmsle_loss, (), root),
    "sigmoid_focal_loss": Formula(sigmoid_focal_loss, ("alpha", "gamma")),
    "asymmetric_loss": Formula(asymmetric_loss, ("gamma_pos", "gamma_neg", "clip")),
    "capsule_margin_loss": Formula(capsule_margin_loss, ("m_plus", "m_minus", "down_weight")),
    "cosine_embedding_loss": Formula(_cosine_embedding_terms, ("margin",), _cosine_embedding_finish),
    "triplet_margin_loss": Formula(_triplet_terms, ("norm", "margin", "eps", "swap"), _triplet_finish),
}


# Of losses whose parameter is an operand, a number for each element: no kernel takes these.
BY_ELEMENT: dict[str, Formula] = {
    "smooth_l1_loss": Formula(smooth_l1_loss_of_betas),
    "huber_loss": Formula(huber_loss_of_deltas),
}


def pointwise(formula: Formula, tensors: Tensors, parameters: Mapping[str, float], o: Any) -> Tensor:
    """The loss of pointwise operands (then weight, mask and what multiplies the weight), reduced as ``o`` says: see
    csrc/pointwise/pointwise.h."""
    *operands, weight, mask, by_sample = tensors
    operands = [t for t in operands if t is not None]
    first = operands[0]
    accum = torch.float64 if formula.wide else accum_dtype(DTYPES[o.loss_dtype])
    if by_sample is not None:
        weight = weight.to(accum) * by_sample.to(accum)
    # What is left out may hold anything; where a weight is 0, its own derivative still asks for finite values.
    hidden = None if mask is None else ~mask
    if weight is not None:
        unused = (weight == 0) & ~torch.stack([t.detach().isfinite() for t in operands]).all(0)
        hidden = unused if hidden is None else hidden | unused
    values = [t.to(accum) if hidden is None else torch.where(hidden, 1.0, t.to(accum)) for t in operands]
    terms = formula.terms(*values, **parameters)
    terms = terms if isinstance(terms, tuple) else (terms,)
    share = None if weight is None else weight.to(accum)
    if mask is not None:
        share = torch.where(mask, 1.0 if share is None else share, 0.0)
    if share is not None:
        terms = tuple(term * share for term in terms)
    if o.reduction == NONE:
        return terms[0] if formula.finish is None else formula.finish(*terms, **parameters)
    cols = list(range(o.row_dims, first.dim()))

    def summed(t: Tensor) -> Tensor:  # with all dimensions: vmap over no samples cannot divide what has none
        return t.sum(cols, keepdim=True, dtype=torch.float64) if cols else t.double()

    sums = [summed(term) for term in terms]
    if o.reduction == MEAN:
        if share is None or (mask is None and not o.weight_denominator):
            sums = [s / first.shape[o.row_dims :].numel() for s in sums]
        else:
            counted = share if o.weight_denominator else mask.to(accum)
            total = summed(counted) * (o.weight_denominator or 1.0)
            # Where a mask leaves nothing: nan, without a gradient.
            nothing = torch.zeros_like(total, dtype=torch.bool) if mask is None else total == 0
            sums = [torch.where(nothing, torch.nan, s / torch.where(nothing, 1.0, total)) for s in sums]
    result = sums[0] if formula.finish is None else formula.finish(*sums, **parameters)
    return result.reshape(first.shape[: o.row_dims]).to(accum)


# ------------------------------------------------------------------------------------------------------------- row maps


def _focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma nll (Lin et al., 2017), p = e^-nll."""
    nothing = nll == 0  # a power has no derivative there
    some = torch.where(nothing, 1.0, nll)
    return torch.where(nothing, 0.0, (-torch.expm1(-some)) ** gamma * some) if gamma else nll


def _poly1(nll: Tensor, epsilon: float) -> Tensor:
    """nll + epsilon (1 - p) (Leng et al., 2022)."""
    return nll - epsilon * torch.expm1(-nll)


def _generalized_cross_entropy(nll: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q (Zhang & Sabuncu, 2018)."""
    x = q * nll
    # The derivative of expm1 is its result + 1, of which little is left where p^q is small.
    return torch.where(x > 1, 1 - torch.exp(-x), -torch.expm1(-x)) / q


def _token_scaled(nll: Tensor) -> Tensor:
    """p nll, p a constant."""
    p = torch.exp(-nll).detach()
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, nll))


# g(nll) by the names of csrc/rowwise/row_maps.h.
ROW_MAPS: dict[str, Callable[..., Tensor]] = {
    "focal": _focal,
    "poly1": _poly1,
    "generalized_cross_entropy": _generalized_cross_entropy,
    "token_scaled": _token_scaled,
}
# All of them in the order of their numbers, with the names of their parameters; the first is none.
ROW_MAP_KINDS = [
    (name, tuple(parameters.split(",")) if parameters else ())
    for name, _, parameters in (kind.partition(":") for kind in ops.row_maps().split())
]


# --------------------------------------------------------------------------------------------- losses over a class axis

# Bits of `flags` of cross entropy, as in csrc/rowwise/cross_entropy_torch.cpp.
ALL_IGNORED_ZERO, ZERO_TIMES_INF = 4, 8


def row_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a row counts, its class index (ignored ones replaced) and w_t (0 there): [N, 1, d1, ...] each.

    Class weights [C] are chosen, not multiplied: those of classes that no target has may be infinite.
    """
    target = target.to(torch.int64)  # torch's own operators do not take every integer dtype everywhere
    counts = (target != ignore_index).unsqueeze(1)
    index = torch.where(counts, target.unsqueeze(1), 0)
    return counts, index, counts.to(dtype) if weight is None else torch.where(counts, weight.to(dtype)[index], 0.0)


def per_row(grad_output: Tensor, rows: Tensor, reduction: int) -> Tensor:
    """grad_output as it multiplies rows [N, 1, d1, ...]. Never of dimension 0: vmap over no samples cannot combine that
    with others."""
    return grad_output.unsqueeze(1) if reduction == NONE else grad_output.reshape([1] * rows.dim())


class _RowTerms(NamedTuple):
    """What the formulas share, all in the accumulation type; `w` and `s` so that they broadcast against the logits."""

    z: Tensor
    slope: Any  # dz/dx
    lse: Tensor
    softmax: Tensor
    w: Tensor
    s: Tensor
    counts: Tensor  # rows
    target_index: Tensor | None  # of an index target, in its range for ignored rows too
    row_weight: Tensor  # what the row adds to D, but for s
    p: Any  # smoothed probabilities, or None
    smooth_share: float  # e / C


def smooth_share(logits: Tensor, o: Any) -> float:
    return o.label_smoothing / max(logits.shape[1], 1)


def smoothed(p: Tensor, o: Any) -> Tensor:
    return p * (1 - o.label_smoothing) + smooth_share(p, o)


# The least sine of an angle in the derivative of a margin, as in csrc/rowwise/cross_entropy_math.h.
LEAST_SINE = 1e-3


def with_margin(x: Tensor, angle: float, cosine: float) -> tuple[Tensor, Tensor]:
    """A cosine after the margins, and its derivative: see Margin in csrc/rowwise/cross_entropy_math.h."""
    square = (1 - x) * (1 + x)
    wide = square > LEAST_SINE**2
    # Towards 1 the sine's derivative stops growing, while its value goes on.
    change = torch.where(square < 0, 0.0, square - square.detach())
    near = square.detach().clamp(min=0).sqrt() + change / (2 * LEAST_SINE)
    sine = torch.where(wide, torch.where(wide, square, 1.0).sqrt(), near)
    turned = x > -math.cos(angle)
    moved = x * math.cos(angle) - sine * math.sin(angle)
    slope = math.cos(angle) + torch.where(square < 0, 0.0, math.sin(angle) * x / sine.clamp(min=LEAST_SINE))
    value = torch.where(turned, moved, x - angle * math.sin(angle)) - cosine
    return value, torch.where(turned, slope, 1.0)


def _row_terms(tensors: Tensors, o: Any) -> _RowTerms:
    logits, target, weight, sample_weight, _ = tensors
    accum = accum_dtype(logits.dtype)
    x = logits.to(accum)
    margin_slope: Tensor | None = None
    if o.margin_angle or o.margin_cosine:
        index = row_weights(target, None, o.ignore_index, accum)[1]
        value, derivative = with_margin(x.gather(1, index), o.margin_angle, o.margin_cosine)
        x, margin_slope = x.scatter(1, index, value), torch.ones_like(x).scatter(1, index, derivative)
    z = x * o.logit_scale
    slope: Any = o.logit_scale
    if o.softcap > 0:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t * t)
    if margin_slope is not None:
        slope = slope * margin_slope
    lse, softmax = torch.logsumexp(z, 1, keepdim=True), torch.softmax(z, 1)
    w = torch.ones(1, dtype=accum, device=z.device) if weight is None else weight.to(accum)
    w = w.view(-1, *[1] * (logits.dim() - 2))
    s = torch.ones_like(lse) if sample_weight is None else sample_weight.unsqueeze(1)
    share = smooth_share(logits, o)
    if target.is_floating_point():
        p, counts = smoothed(target.to(accum), o), torch.ones_like(lse, dtype=torch.bool)
        return _RowTerms(z, slope, lse, softmax, w, s, counts, None, torch.ones_like(lse), p, share)
    counts, index, row_weight = row_weights(target, weight, o.ignore_index, accum)
    return _RowTerms(z, slope, lse, softmax, w, s, counts, index, row_weight, None, share)


def product(factor: Tensor, value: Tensor, o: Any) -> Tensor:
    """factor * value; with zero_times_inf="zero" an exact 0 wins over an infinite value."""
    product = factor * value
    return torch.where(factor == 0, 0.0, product) if o.flags & ZERO_TIMES_INF else product


def sum_rows(per_class: Tensor, weight: Tensor) -> Tensor:
    return per_class.sum([d for d in range(per_class.dim()) if d != 1]).to(weight.dtype)


def _denominator(r: _RowTerms, share: Tensor, normalizer: Tensor | None, o: Any) -> Tensor:
    """What a mean divides by: D where ``share`` is the rows' class weight, Dn where it says whether they count."""
    total = (r.s * share).sum() if normalizer is None else normalizer.to(r.z.dtype)
    return torch.where(r.counts.any(), total, 1.0) if o.flags & ALL_IGNORED_ZERO else total


def cross_entropy(tensors: Tensors, o: Any) -> Tensor:
    """The loss itself. With l = sum_c q_c (lse - z_c) and m = sum_c q_c, a row map g makes m g(l / m) of a row's l."""
    normalizer = tensors[4]
    r = _row_terms(tensors, o)
    minus_log_p = r.lse - r.z
    if r.target_index is None:
        q = r.w * r.p
        nll, mass = product(q, minus_log_p, o).sum(1, keepdim=True), q.sum(1, keepdim=True)
    else:
        nll = (1 - o.label_smoothing) * product(r.row_weight, minus_log_p.gather(1, r.target_index), o)
        mass = (1 - o.label_smoothing) * r.row_weight
        if o.label_smoothing:
            nll = nll + r.smooth_share * product(r.w.expand_as(r.z), minus_log_p, o).sum(1, keepdim=True)
            mass = mass + r.smooth_share * r.w.expand_as(r.z).sum(1, keepdim=True)
    if o.row_map:
        name, parameters = ROW_MAP_KINDS[o.row_map]
        nothing = mass == 0
        each = torch.where(nothing, 0.0, nll) / torch.where(nothing, 1.0, mass)
        nll = torch.where(nothing, 0.0, mass * ROW_MAPS[name](each, *(o.map_a, o.map_b)[: len(parameters)]))
    nll = torch.where(r.counts, r.s * nll, 0.0)
    z_term = torch.where(r.counts, r.s * (o.z_loss * r.lse**2), 0.0) if o.z_loss else torch.zeros_like(nll)
    if o.reduction == NONE:
        return (nll + z_term).squeeze(1)
    if o.reduction != MEAN:
        return nll.sum() + z_term.sum()
    mean = nll.sum() / _denominator(r, r.row_weight, normalizer, o)
    return mean + z_term.sum() / _denominator(r, r.counts, normalizer, o) if o.z_loss else mean


def cross_entropy_gradients(grad_output: Tensor, tensors: Tensors, o: Any, needs: Needs) -> Grads:
    """By logits, probabilities and class weights, in torch's order of operations (without a row map)."""
    logits, _, weight, _, normalizer = tensors
    r = _row_terms(tensors, o)
    g = per_row(grad_output.to(r.z.dtype), r.row_weight, o.reduction)

    def row_scale(share: Tensor) -> Tensor:
        if o.reduction == MEAN:
            g_mean = g / _denominator(r, share, normalizer, o).view_as(g)
            return torch.where(r.counts, g_mean * r.s, 0.0)
        return torch.where(r.counts, g * r.s, 0.0)

    # By the log-probabilities first, as torch does: infinite weights then give the same infinities.
    u = row_scale(r.row_weight)
    if r.target_index is None:
        by_log_p = -u * (r.w * r.p)
    else:
        is_target = torch.zeros_like(r.z, dtype=torch.bool).scatter(1, r.target_index, True)
        # Chosen, not multiplied: see row_weights.
        by_log_p = torch.where(is_target, -(1 - o.label_smoothing) * r.row_weight * u, 0.0)
        if o.label_smoothing:
            by_log_p = by_log_p - r.smooth_share * r.w * u
    grad = by_log_p - r.softmax * by_log_p.sum(1, keepdim=True)
    if o.z_loss:
        grad = grad + row_scale(r.counts) * torch.where(r.counts, (2 * o.z_loss) * r.lse * r.softmax, 0.0)
    minus_log_p = r.lse - r.z
    return (
        (grad * r.slope).to(logits.dtype) if needs[0] else None,
        u * (1 - o.label_smoothing) * r.w * minus_log_p if needs[1] else None,
        sum_rows(u * r.p * minus_log_p, weight) if needs[2] else None,
    )


def cross_entropy_tangent(tensors: Tensors, tangents: Sequence[Tensor | None], o: Any) -> Tensor:
    """In the loss's own order of operations: sums over the rows first, each divided once (without a row map)."""
    normalizer = tensors[4]
    logits_t, target_t, weight_t = tangents
    r = _row_terms(tensors, o)
    z_t = torch.zeros_like(r.z) if logits_t is None else logits_t.to(r.z.dtype) * r.slope
    lse_t = (r.softmax * z_t).sum(1, keepdim=True)
    smooth: Any = None
    if r.target_index is not None:
        nll = (1 - o.label_smoothing) * r.row_weight * (lse_t - z_t.gather(1, r.target_index))
        if o.label_smoothing:
            smooth = r.smooth_share * (r.w * (lse_t - z_t)).sum(1, keepdim=True)
    else:
        per_weight = torch.zeros_like(r.z) if logits_t is None else r.p * (lse_t - z_t)
        if target_t is not None:
            per_weight = per_weight + (1 - o.label_smoothing) * product(target_t, r.lse - r.z, o)
        terms = torch.zeros_like(r.z) if logits_t is target_t is None else product(r.w, per_weight, o)
        if weight_t is not None:
            minus_p_log_p = product(r.p, r.lse - r.z, o)
            terms = terms + product(weight_t.view(r.w.shape), minus_p_log_p, o)
        nll = terms.sum(1, keepdim=True)

    def reduced(rows: Tensor, share: Tensor) -> Tensor:
        rows = torch.where(r.counts, r.s * rows, 0.0)
        if o.reduction == NONE:
            return rows.squeeze(1)
        return rows.sum() / _denominator(r, share, normalizer, o) if o.reduction == MEAN else rows.sum()

    result = reduced(nll, r.row_weight)
    if smooth is not None:
        result = result + reduced(smooth, r.row_weight)
    if o.z_loss:
        result = result + reduced(2 * o.z_loss * r.lse * lse_t, r.counts)
    return result.to(DTYPES[o.loss_dtype])


class RowFormula(NamedTuple):
    """A loss over a class axis that needs no softmax.

    Attributes:
        value: of each row, ``value(x, index, **parameters)`` for x [N, C, ...] and index [N, 1, ...]: [N, 1, ...].
        parameters: their names, in the kernels' order.
    """

    value: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()


def nll_loss(x: Tensor, index: Tensor) -> Tensor:
    """-x_t"""
    return -x.gather(1, index)


def multi_margin_loss(x: Tensor, index: Tensor, p: float = 1.0, margin: float = 1.0) -> Tensor:
    """sum over c != t of max(0, margin - x_t + x_c)^p / C"""
    z = _at_least(margin - x.gather(1, index) + x, 0.0)
    others = torch.ones_like(z).scatter(1, index, 0.0)
    return (others * (z if p == 1 else z * z)).sum(1, keepdim=True) / x.shape[1]


def capsule_margin_rows(
    x: Tensor, index: Tensor, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5
) -> Tensor:
    """The sum over the classes, of which one is there."""
    t = torch.zeros_like(x).scatter(1, index, 1.0)
    return capsule_margin_loss(x, t, m_plus, m_minus, down_weight).sum(1, keepdim=True)


ROW_LOSSES: dict[str, RowFormula] = {
    "nll_loss": RowFormula(nll_loss),
    "multi_margin_loss": RowFormula(multi_margin_loss, ("p", "margin")),
    "capsule_margin_loss": RowFormula(capsule_margin_rows, ("m_plus", "m_minus", "down_weight")),
}


def row_loss(formula: RowFormula, tensors: Tensors, parameters: Mapping[str, float], o: Any) -> Tensor:
    """The loss of the rows of input, target and weight, reduced as ``o`` says: see csrc/rowwise/row_loss.h."""
    input, target, weight = tensors
    mean_over_rows, ignores_nothing = o.flags & 1, o.flags & 2
    accum = accum_dtype(input.dtype)
    counts, index, w_t = row_weights(target, weight, -1 if ignores_nothing else o.ignore_index, accum)
    rows = torch.where(counts, w_t * formula.value(input.to(accum), index, **parameters), 0.0)
    if o.reduction == NONE:
        return rows.squeeze(1)
    return rows.sum() / (counts if mean_over_rows else w_t).sum() if o.reduction == MEAN else rows.sum()


# ------------------------------------------------------------------------------------------------------------ dice loss


def dice_loss(tensors: Tensors, o: Any) -> Tensor:
    """What a loss of dice's family makes of I = sum p t, P = sum p and T = sum t of every sample and class; of their
    squares with ``squared``. The activations have the codes 0 (none), 1 (softmax), 2 (sigmoid); the losses 0 (dice),
    1 (Tversky's, with alpha, beta, gamma), 2 (dice and cross entropy, with the factors of both and the smoothing)."""
    x, target, weight = tensors
    x = x.to(accum_dtype(x.dtype))
    dims = [0] * o.batch + list(range(2, x.dim()))

    def sums(values: Tensor) -> Tensor:
        return values.sum(dims) if dims else values  # torch takes no dimensions for all

    counts = None
    counted = torch.ones(1 if o.batch else (x.shape[0], 1), dtype=torch.bool, device=x.device)  # samples
    if target.is_floating_point():
        t = target.to(x.dtype)
    else:
        index = target.to(torch.int64).unsqueeze(1)
        counts = index != o.ignore_index
        if math.prod(x.shape[d] for d in dims):
            counted = sums(counts) > 0
        classes = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
        t = ((index == classes) & counts).to(x.dtype)
        x = torch.where(counts, x, 0.0)
    p = x.softmax(1) if o.activation == 1 else x.sigmoid() if o.activation == 2 else x
    if counts is not None:
        p = torch.where(counts, p, 0.0)

    overlap, area_t = sums(p * t), sums(t * t if o.squared else t)
    there = ((area_t != 0) | (not o.skip_absent)) & counted
    if o.loss == 1:
        alpha, beta, gamma = o.params
        wrong = alpha * (sums(p) - overlap) + beta * (area_t - overlap)
        loss = (wrong + o.smooth_dr - o.smooth_nr) / torch.where(there, overlap + wrong + o.smooth_dr, 1.0)
        if gamma != 1:
            loss = torch.where(loss <= 0, 0.0, torch.where(loss <= 0, 1.0, loss) ** gamma)
    else:
        area = sums(p * p if o.squared else p) + area_t + o.smooth_dr
        loss = 1 - (2 * overlap + o.smooth_nr) / torch.where(there, area, 1.0)
    loss = torch.where(there, loss, 0.0)
    if weight is not None:
        loss = loss * weight
    if not o.include_background:
        loss = loss[..., 1:]
    if o.reduction == NONE:
        return loss
    total = loss.sum()
    if o.reduction == MEAN:
        total = total / (counted.sum().clamp(min=min(1, counted.numel())) * loss.shape[-1])
    return total if o.loss != 2 else o.params[0] * total + o.params[1] * _cross_entropy_of_dice(x, t, weight, o)


def _cross_entropy_of_dice(x: Tensor, t: Tensor, weight: Tensor | None, o: Any) -> Tensor:
    """Of logits and one-hot targets, which are 0 for all classes where a row does not count."""
    log_p, smoothing = x.log_softmax(1), o.params[2]
    w = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weight is None else weight
    w = w.view(1, -1, *[1] * (x.dim() - 2))
    rows = (1 - smoothing) * torch.where(t > 0, -w * log_p, 0.0).sum(1)
    if smoothing:
        rows = rows + smoothing / x.shape[1] * torch.where(t.sum(1) > 0, (-w * log_p).sum(1), 0.0)
    return rows.sum() / (w * t).sum() if o.reduction == MEAN else rows.sum()


# ------------------------------------------------------------------------------------------------ divergences of logits


def divergence_dtype(p: Tensor, q: Tensor) -> torch.dtype:
    """Of sums and exponentials."""
    return accum_dtype(torch.float64 if p.dtype is torch.float64 else q.dtype)


def divergence(tensors: Tensors, o: Any, js: bool) -> Tensor:
    """KL(p || q) of softmaxes, or beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, reduced as
    ``o`` says: see csrc/rowwise/divergence.h."""
    x_p, x_q, weight, total = tensors
    accum = divergence_dtype(x_p, x_q)
    logits = [x_p.to(accum), x_q.to(accum)]
    counts = None if weight is None else (weight != 0).unsqueeze(1)
    if counts is not None:  # what is left out may hold anything
        logits = [torch.where(counts, x, 0.0) for x in logits]
    log_p, log_q = ((x / o.temperature).log_softmax(1) for x in logits)

    def against(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        nothing = a == 0
        return (a * (torch.where(nothing, 0.0, log_a) - torch.where(nothing, 0.0, log_b))).sum(1)

    if js:
        m = o.beta * log_p.exp() + (1 - o.beta) * log_q.exp()
        log_m = torch.where(m == 0, 1.0, m).log()
        rows = o.beta * against(log_p, log_m) + (1 - o.beta) * against(log_q, log_m)
    else:
        rows = against(log_p, log_q)
    rows = rows * o.scale
    if weight is not None:
        rows = torch.where(weight == 0, 0.0, weight * rows)
    if o.reduction == NONE:
        return rows
    if o.reduction != MEAN:
        return rows.sum()
    if total is None:
        return rows.mean()
    nothing = total == 0  # nan, without a gradient
    return torch.where(nothing, torch.nan, rows.sum() / torch.where(nothing, 1.0, total))
