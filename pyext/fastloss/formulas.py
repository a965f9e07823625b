"""What every loss is, composed of torch operations.

Second and higher derivatives and those of forward mode are torch's of these formulas (:mod:`fastloss._autograd`); tests
and benchmarks hold the kernels to them as well. A formula is exact where it is smooth; at kinks its slope is that of
the kernels, 0 for ``|d|`` at 0.
"""

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


def relative_l1_loss(x: Tensor, t: Tensor, eps: float = 0.0, symmetric: bool = False) -> Tensor:
    """|x - t| / max(|t|, eps), or / max((|x| + |t|) / 2, eps)."""
    scale = (x.abs() + t.abs()) / 2 if symmetric else t.abs()
    return (x - t).abs() / scale.clamp(min=eps)


def binary_cross_entropy_with_logits(
    x: Tensor, t: Tensor, pos_weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """pw t softplus(-x) + (1 - t) softplus(x), with t moved towards 1/2 by the smoothing."""
    t = t * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else t
    log_weight = 1.0 if pos_weight is None else (pos_weight - 1) * t + 1
    return (1 - t) * x + log_weight * F.softplus(-x)


def _root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _cosine_terms(x: Tensor, t: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return x * t, x * x, t * t


def _cosine_finish(product: Tensor, x_square: Tensor, t_square: Tensor, eps: float = 0.0) -> Tensor:
    return 1 - product / (_root(x_square) * _root(t_square)).clamp(min=eps)


FORMULAS: dict[str, Formula] = {
    "l1_loss": Formula(l1_loss),
    "mse_loss": Formula(mse_loss),
    "rmse_loss": Formula(lambda x, t, eps: (x - t) ** 2, ("eps",), lambda square, eps: _root(square + eps), wide=True),
    "smooth_l1_loss": Formula(smooth_l1_loss, ("beta",)),
    "huber_loss": Formula(huber_loss, ("delta",)),
    "log_cosh_loss": Formula(log_cosh_loss),
    "relative_l1_loss": Formula(relative_l1_loss, ("eps", "symmetric")),
    "binary_cross_entropy_with_logits": Formula(binary_cross_entropy_with_logits, ("label_smoothing",)),
    "cosine_distance_loss": Formula(_cosine_terms, ("eps",), _cosine_finish),
}


# Of losses whose parameter is an operand, a number for each element: no kernel takes these.
BY_ELEMENT: dict[str, Formula] = {
    "smooth_l1_loss": Formula(smooth_l1_loss_of_betas),
    "huber_loss": Formula(huber_loss_of_deltas),
}


def pointwise(formula: Formula, tensors: Tensors, parameters: Mapping[str, float], o: Any) -> Tensor:
    """The loss of pointwise operands (then weight, mask), reduced as ``o`` says: see csrc/pointwise/pointwise.h."""
    *operands, weight, mask = tensors
    operands = [t for t in operands if t is not None]
    first = operands[0]
    accum = torch.float64 if formula.wide else accum_dtype(DTYPES[o.loss_dtype])
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


# g(nll) by the names of csrc/rowwise/row_maps.h.
ROW_MAPS: dict[str, Callable[..., Tensor]] = {
    "focal": _focal,
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


def _row_terms(tensors: Tensors, o: Any) -> _RowTerms:
    logits, target, weight, sample_weight, _ = tensors
    accum = accum_dtype(logits.dtype)
    z = logits.to(accum) * o.logit_scale
    slope: Any = o.logit_scale
    if o.softcap > 0:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t * t)
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
    z = (margin - x.gather(1, index) + x).clamp(min=0)
    others = torch.ones_like(z).scatter(1, index, 0.0)
    return (others * (z if p == 1 else z * z)).sum(1, keepdim=True) / x.shape[1]


ROW_LOSSES: dict[str, RowFormula] = {
    "nll_loss": RowFormula(nll_loss),
    "multi_margin_loss": RowFormula(multi_margin_loss, ("p", "margin")),
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
    """1 - (2 sum p t + smooth_nr) / (sum p + sum t + smooth_dr), of every sample and class; squares in the denominator
    with ``squared``. The activations have the codes 0 (none), 1 (softmax), 2 (sigmoid)."""
    x, target, weight = tensors
    x = x.to(accum_dtype(x.dtype))
    if target.is_floating_point():
        counts, t = None, target.to(x.dtype)
    else:
        index = target.to(torch.int64).unsqueeze(1)
        counts = index != o.ignore_index
        classes = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
        t = ((index == classes) & counts).to(x.dtype)
        x = torch.where(counts, x, 0.0)
    p = x.softmax(1) if o.activation == 1 else x.sigmoid() if o.activation == 2 else x
    if counts is not None:
        p = torch.where(counts, p, 0.0)
    dims = [0] * o.batch + list(range(2, x.dim()))

    def sums(values: Tensor) -> Tensor:
        return values.sum(dims) if dims else values  # torch takes no dimensions for all

    area_t = sums(t * t if o.squared else t)
    area = sums(p * p if o.squared else p) + area_t + o.smooth_dr
    if o.skip_absent:
        area = torch.where(area_t == 0, 1.0, area)
    loss = 1 - (2 * sums(p * t) + o.smooth_nr) / area
    if o.skip_absent:
        loss = torch.where(area_t == 0, 0.0, loss)
    if weight is not None:
        loss = loss * weight
    if not o.include_background:
        loss = loss[..., 1:]
    return loss if o.reduction == NONE else loss.mean() if o.reduction == MEAN else loss.sum()
