"""Cross entropy: log-softmax and negative log likelihood in one pass over the logits.

The mathematics is in ``csrc/rowwise/cross_entropy.h``; this file checks arguments, chooses the path and gives autograd
its rules. Three ways to a gradient:

- *fused* (scalar reductions): the gradient for grad_output 1 is computed in forward while the row is at hand, one read
  and one write of the logits in all; backward scales it, or returns it untouched when grad_output is 1;
- *recomputing* (reduction ``none``, float16, torch.compile, forward mode, ``grad_in_forward=False``): forward reads the
  logits once and saves two numbers per row; backward reads them again and writes the gradient;
- the same under torch.func transforms, in the form that they ask for.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import errors
from .._library import define_recorded, loop_vmap, ops
from . import _common, _rowwise
from ._common import DTYPE_CODES, DTYPES, MEAN, NONE

# Bits of `flags`, as in cross_entropy_torch.cpp.
SAVE, GRAD, ALL_IGNORED_ZERO, ZERO_TIMES_INF, STATS = 1, 2, 4, 8, 16


class CrossEntropyStats(NamedTuple):
    """What ``return_stats=True`` adds, from the same read of the logits. No gradient flows through it.

    Attributes:
        lse: log-sum-exp of each row of (scaled, capped) logits, shape of an index target, float32 (float64 for float64
            logits).
        argmax: predicted class, int64, shape of an index target.
        accuracy: share of the counted targets that were predicted right, float32, shape (). For probability targets the
            wanted class is their arg-max.
        entropy: of each row's softmax, in nats, shape and dtype of lse.
    """

    lse: Tensor
    argmax: Tensor
    accuracy: Tensor
    entropy: Tensor


class _Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    reduction: int
    loss_dtype: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    row_map: int
    map_params: list[float]
    flags: int


# ------------------------------------------------------------------------------------------------ fake kernels, vmap


def _saved_count(logits: Tensor, target: Tensor, options: _Options) -> int:
    rows = 1
    for n in _rowwise.row_shape(logits):
        rows = rows * n
    soft, mapped = target.is_floating_point(), options.row_map != 0
    return (2 + soft + mapped + (soft and mapped)) * rows + 2


def _fake_loss(logits: Tensor, options: _Options) -> Tensor:
    shape = _rowwise.row_shape(logits) if options.reduction == NONE else []
    return logits.new_empty(shape, dtype=DTYPES[options.loss_dtype])


def _fake_saved_grad(logits: Tensor, target: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    nothing = logits.new_empty([0], dtype=torch.float32)
    saved, grad = nothing, torch.empty_like(nothing)
    if options.flags & SAVE:
        saved = logits.new_empty([_saved_count(logits, target, options)], dtype=_common.accum_dtype(logits.dtype))
    if options.flags & GRAD:
        grad = torch.empty_like(logits)
    return saved, grad


def _fake_stats(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _rowwise.row_shape(logits)
    return (
        logits.new_empty(shape, dtype=_common.accum_dtype(logits.dtype)),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty([], dtype=torch.float32),
        logits.new_empty(shape, dtype=_common.accum_dtype(logits.dtype)),
    )


@torch.library.register_fake("fastloss::cross_entropy_forward")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, normalizer: Any, *options: Any) -> Any:
    return (_fake_loss(logits, _Options(*options)), *_fake_saved_grad(logits, target, _Options(*options)))


@torch.library.register_fake("fastloss::cross_entropy_value")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, normalizer: Any, *options: Any) -> Any:
    return _fake_loss(logits, _Options(*options))


@torch.library.register_fake("fastloss::cross_entropy_forward_stats")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, normalizer: Any, *options: Any) -> Any:
    o = _Options(*options)
    return (_fake_loss(logits, o), *_fake_saved_grad(logits, target, o), *_fake_stats(logits))


@torch.library.register_fake("fastloss::cross_entropy_forward_inplace")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, normalizer: Any, *options: Any) -> Any:
    o = _Options(*options)
    if o.flags & STATS:
        return (_fake_loss(logits, o), *_fake_stats(logits))
    return (_fake_loss(logits, o), *(logits.new_empty([0], dtype=torch.float32) for _ in range(4)))


@torch.library.register_fake("fastloss::cross_entropy_backward")
def _(grad_output: Any, logits: Any, *_: Any) -> Any:
    return torch.empty_like(logits)


@torch.library.register_fake("fastloss::cross_entropy_target_backward")
def _(grad_output: Any, logits: Any, target: Any, *_: Any) -> Any:
    return torch.empty_like(target)


for _name, _outputs in (
    ("cross_entropy_value", 1),
    ("cross_entropy_forward", 3),
    ("cross_entropy_forward_stats", 7),
    ("cross_entropy_backward", 1),
    ("cross_entropy_target_backward", 1),
):
    torch.library.register_vmap(f"fastloss::{_name}", loop_vmap(getattr(ops, _name), _outputs))


# --------------------------------------------------------------------------- formulas for second order and forward mode


class _Terms(NamedTuple):
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


def _smooth_share(logits: Tensor, o: _Options) -> float:
    return o.label_smoothing / max(logits.shape[1], 1)


def _smoothed(p: Tensor, o: _Options) -> Tensor:
    return p * (1 - o.label_smoothing) + _smooth_share(p, o)


def _terms(logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, o: _Options) -> _Terms:
    accum = _common.accum_dtype(logits.dtype)
    z = logits.to(accum) * o.logit_scale
    slope: Any = o.logit_scale
    if o.softcap > 0:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t * t)
    lse, softmax = torch.logsumexp(z, 1, keepdim=True), torch.softmax(z, 1)
    w = torch.ones(1, dtype=accum, device=z.device) if weight is None else weight.to(accum)
    w = w.view(-1, *[1] * (logits.dim() - 2))
    s = torch.ones_like(lse) if sample_weight is None else sample_weight.unsqueeze(1)
    share = _smooth_share(logits, o)
    if target.is_floating_point():
        p, counts = _smoothed(target.to(accum), o), torch.ones_like(lse, dtype=torch.bool)
        return _Terms(z, slope, lse, softmax, w, s, counts, None, torch.ones_like(lse), p, share)
    counts, index, row_weight = _rowwise.row_weights(target, weight, o.ignore_index, accum)
    return _Terms(z, slope, lse, softmax, w, s, counts, index, row_weight, None, share)


def _formula(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    grad_output: Tensor,
    o: _Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients composed of torch operations, so that they can be differentiated again.

    Returns the derivatives with respect to logits, probabilities, and class weight (the last per row and class, still
    to be summed over the rows), each times grad_output. float16 and bfloat16 are computed in float32.
    """
    r = _terms(logits, target, weight, sample_weight, o)
    per_row = _rowwise.per_row(grad_output.to(r.z.dtype), r.row_weight, o.reduction)

    def row_scale(denominator: Tensor) -> Tensor:
        if o.reduction != MEAN:
            return torch.where(r.counts, per_row * r.s, 0.0)
        total = (r.s * denominator).sum().view_as(per_row)
        if o.flags & ALL_IGNORED_ZERO:
            total = torch.where(r.counts.any(), total, 1.0)
        return torch.where(r.counts, per_row / total * r.s, 0.0)

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
    grad = (grad * r.slope).to(logits.dtype)
    if r.target_index is not None:
        return grad, None, None
    minus_log_p = r.lse - r.z
    return grad, u * (1 - o.label_smoothing) * r.w * minus_log_p, u * r.p * minus_log_p


def _product(factor: Tensor, value: Tensor, o: _Options) -> Tensor:
    """factor * value; with zero_times_inf="zero" an exact 0 wins over an infinite value."""
    product = factor * value
    return torch.where(factor == 0, 0.0, product) if o.flags & ZERO_TIMES_INF else product


def _sum_rows(per_class: Tensor, weight: Tensor) -> Tensor:
    return per_class.sum([d for d in range(per_class.dim()) if d != 1]).to(weight.dtype)


def _backward(ctx: Any, grad_output: Tensor, saved_tensors: Any, kernel_grad: Any) -> tuple[Any, ...]:
    """Gradients for (logits, target, weight). ``kernel_grad`` gives the logits' own, as the path at hand gets it."""
    logits, target, weight, sample_weight, saved = saved_tensors
    o: _Options = ctx.options
    need_logits, need_target, need_weight = ctx.needs_input_grad[:3]
    grad_output = grad_output.contiguous()
    grad = grad_target = grad_weight = None
    if need_logits:
        with torch.no_grad():
            grad = kernel_grad(grad_output)
    if need_target:
        with torch.no_grad():
            grad_target = ops.cross_entropy_target_backward(
                grad_output, logits, target, weight, sample_weight, None, saved, *o
            )
    if need_weight:  # with unit weights and no smoothing the probabilities' gradient is u (lse - z)
        with torch.no_grad():
            plain, wide = o._replace(label_smoothing=0.0), target.detach().to(weight.dtype)  # detach: no tangent
            per_class = ops.cross_entropy_target_backward(
                grad_output, logits, wide, None, sample_weight, None, saved, *plain
            )
            grad_weight = _sum_rows(_product(_smoothed(wide, o), per_class, o), weight)
    if _common.differentiated_again(grad_output, logits, target, weight):
        f_logits, f_target, f_weight = _formula(logits, target, weight, sample_weight, grad_output, o)
        grad = None if grad is None else _common.attach(grad, f_logits)
        if grad_target is not None and f_target is not None:
            grad_target = _common.attach(grad_target, f_target)
        if grad_weight is not None and f_weight is not None:
            grad_weight = _common.attach(grad_weight, _sum_rows(f_weight, weight))
    return grad, grad_target, grad_weight, None, None


def _jvp(ctx: Any, logits_t: Tensor | None, target_t: Tensor | None, weight_t: Tensor | None) -> Tensor:
    """The loss's tangent, in the loss's own order of operations: sums over the rows first, each divided once."""
    o: _Options = ctx.options
    with _common.saved_for_jvp(ctx) as (logits, target, weight, sample_weight, *_):
        r = _terms(logits, target, weight, sample_weight, o)
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
                per_weight = per_weight + (1 - o.label_smoothing) * _product(target_t, r.lse - r.z, o)
            terms = torch.zeros_like(r.z) if logits_t is target_t is None else _product(r.w, per_weight, o)
            if weight_t is not None:
                minus_p_log_p = _product(r.p, r.lse - r.z, o)
                terms = terms + _product(weight_t.view(r.w.shape), minus_p_log_p, o)
            nll = terms.sum(1, keepdim=True)

        def reduced(rows: Tensor, denominator: Tensor) -> Tensor:
            rows = torch.where(r.counts, r.s * rows, 0.0)
            if o.reduction == NONE:
                return rows.squeeze(1)
            return rows.sum() / (r.s * denominator).sum() if o.reduction == MEAN else rows.sum()

        result = reduced(nll, r.row_weight)
        if smooth is not None:
            result = result + reduced(smooth, r.row_weight)
        if o.z_loss:
            result = result + reduced(2 * o.z_loss * r.lse * lse_t, r.counts)
        if o.reduction == MEAN and o.flags & ALL_IGNORED_ZERO:
            result = torch.where(r.counts.any(), result, 0.0)
        return result.to(DTYPES[o.loss_dtype])


# --------------------------------------------------------------------------------------------------- autograd


class _Fused(Function):
    """Gradient in forward, held outside the saved tensors: the logits may then change after forward, as in torch."""

    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, weight: Any, sample_weight: Any, options: Any) -> Any:
        o = options._replace(flags=options.flags | GRAD)
        loss, _, ctx.grad = ops.cross_entropy_forward(logits, target, weight, sample_weight, None, *o)
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, sample_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        return _fused_backward(ctx, grad_output)


_apply_fused = _common.direct_apply(_Fused)


class _FusedStats(Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, weight: Any, sample_weight: Any, options: Any) -> Any:
        o = options._replace(flags=options.flags | GRAD)
        loss, _, ctx.grad, *stats = ops.cross_entropy_forward_stats(logits, target, weight, sample_weight, None, *o)
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, sample_weight)
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        return _fused_backward(ctx, grad_output)


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    grad = ctx.grad
    if grad is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient of this cross entropy was given away the "
            "first time. Specify retain_graph=True when calling .backward() or autograd.grad() the first time."
        )
    keep = _common.keeps_graph()
    if not keep:
        ctx.grad = None
    if torch.is_grad_enabled():
        saved = (*ctx.saved_tensors, None)
        return _backward(ctx, grad_output, saved, lambda g: ops.scale_grad(grad, g))
    if keep or _common.is_batched(grad_output):
        return ops.scale_grad(grad, grad_output), None, None, None, None
    ops.scale_grad_(grad, grad_output)
    return grad, None, None, None, None


class _InPlace(Function):
    """The gradient takes the logits' own memory; their version counter is moved on."""

    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, weight: Any, sample_weight: Any, options: Any) -> Any:
        loss, *stats = ops.cross_entropy_forward_inplace(logits, target, weight, sample_weight, None, *options)
        torch.autograd.graph.increment_version(logits)
        ctx.grad = logits.detach()  # shares the version counter
        ctx.version = logits._version
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy(inplace_grad=True) cannot be differentiated twice: its logits are gone. Leave "
                "inplace_grad out where create_graph=True is used."
            )
        if ctx.grad is not None and ctx.grad._version != ctx.version:
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): one of the variables needed for gradient computation has been "
                "modified by an inplace operation: the logits, whose memory holds the gradient since forward."
            )
        return _fused_backward(ctx, grad_output)


class _Recompute(Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, weight: Any, sample_weight: Any, options: Any) -> Any:
        o = options._replace(flags=options.flags | SAVE)
        if options.flags & STATS:
            loss, saved, _, *stats = ops.cross_entropy_forward_stats(logits, target, weight, sample_weight, None, *o)
        else:
            loss, saved, _ = ops.cross_entropy_forward(logits, target, weight, sample_weight, None, *o)
            stats = []
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, sample_weight, saved)
        ctx.save_for_forward(logits, target, weight, sample_weight, saved)  # vmap wants the same as for backward
        ctx.mark_non_differentiable(saved, *stats)
        return (loss, saved, *stats)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        return _recompute_backward(ctx, grad_output)


class _ForwardMode(_Recompute):
    """A class of its own because torch.compile refuses functions with a jvp."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)  # zeros for probabilities and weights would meet infinite ones in jvp
        return _Recompute.forward(ctx, *args)

    @staticmethod
    def jvp(ctx: Any, logits_t: Any, target_t: Any, weight_t: Any, *_: Any) -> Any:
        return (_jvp(ctx, logits_t, target_t, weight_t), *[None] * (1 + 4 * bool(ctx.options.flags & STATS)))


def _recompute_backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:  # see set_materialize_grads
        return (None,) * 5
    tensors = ctx.saved_tensors[:5]
    logits, target, weight, sample_weight, saved = tensors

    def kernel_grad(g: Tensor) -> Tensor:
        return ops.cross_entropy_backward(g, logits, target, weight, sample_weight, None, saved, *ctx.options)

    return _backward(ctx, grad_output, tensors, kernel_grad)


def _one_by_one(options: Any) -> _Options:
    """From the options as jvp of vmap wants them, no list among them, or as the operators do."""
    if len(options) == len(_Options._fields):
        return _Options(*options)
    *first, one, two, flags = options
    return _Options(*first, [one, two], flags)


class _Transformed(Function):
    """The recomputing path in the form that torch.func transforms ask for: options one by one, as jvp of vmap wants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Any, target: Any, weight: Any, sample_weight: Any, normalizer: Any, *options: Any) -> Any:
        o = _one_by_one(options)
        o = o._replace(flags=o.flags | SAVE)
        if o.flags & STATS:
            loss, saved, _, *stats = ops.cross_entropy_forward_stats(logits, target, weight, sample_weight, None, *o)
            return (loss, saved, *stats)
        loss, saved, _ = ops.cross_entropy_forward(logits, target, weight, sample_weight, None, *o)
        return loss, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        logits, target, weight, sample_weight, _, *options = inputs
        ctx.options, ctx.count = _one_by_one(options), len(options)
        ctx.set_materialize_grads(False)  # as in _ForwardMode
        _, saved, *stats = output
        ctx.mark_non_differentiable(saved, *stats)
        tensors = logits, target, weight, sample_weight, saved, *stats
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)  # vmap wants the same as for backward

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        return (*_recompute_backward(ctx, grad_output)[:4], *[None] * (1 + ctx.count))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        tangent = _jvp(ctx, *tangents[:3])
        if not ctx.options.flags & STATS:
            return tangent, _common.no_tangent(ctx, 4)
        return (
            tangent,
            *(_common.no_tangent(ctx, i) for i in (4, 5)),
            None,
            *(_common.no_tangent(ctx, i) for i in (7, 8)),
        )


_apply_transformed = _common.opaque_apply(_Transformed)
for _name in ("cross_entropy_forward", "cross_entropy_forward_stats"):
    define_recorded(f"{_name}_recorded", getattr(ops, _name), _Transformed)


def _run(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    o: _Options,
    grad_in_forward: bool | None,
    inplace_grad: bool,
) -> tuple[Tensor, ...]:
    """Loss (and statistics) of canonical arguments: chooses among the paths."""
    stats = bool(o.flags & STATS)
    if _common.transforms_active():
        loss, _, *rest = _apply_transformed(
            logits, target, weight, sample_weight, None, *o[:-2], *(*o.map_params, 0.0, 0.0)[:2], o.flags
        )
        return (loss, *rest)
    if _common.forward_mode_active():
        loss, _, *rest = _ForwardMode.apply(logits, target, weight, sample_weight, o)
        return (loss, *rest)
    if _common.recording():
        o = o._replace(flags=o.flags | SAVE)
        run = ops.cross_entropy_forward_stats_recorded if stats else ops.cross_entropy_forward_recorded
        loss, _, _, *rest = run(logits, target, weight, sample_weight, None, *o)
        return (loss, *rest)
    wanted = torch.is_grad_enabled() and (
        logits.requires_grad or target.requires_grad or (weight is not None and weight.requires_grad)
    )
    if not wanted:
        if stats:
            loss, _, _, *rest = ops.cross_entropy_forward_stats(logits, target, weight, sample_weight, None, *o)
            return (loss, *rest)
        return (ops.cross_entropy_value(logits, target, weight, sample_weight, None, *o),)
    fused = o.reduction != NONE and logits.requires_grad
    fused = fused and not (target.requires_grad or (weight is not None and weight.requires_grad))
    fused = fused and not torch.compiler.is_compiling() and not _common.saved_tensor_hooks_active()
    if inplace_grad and fused:
        loss, *rest = _InPlace.apply(logits, target, weight, sample_weight, o)
        return (loss, *rest) if stats else (loss,)
    if grad_in_forward is None:
        grad_in_forward = logits.dtype is not torch.float16
    if fused and grad_in_forward:
        if stats:
            return _FusedStats.apply(logits, target, weight, sample_weight, o)
        return (_apply_fused(logits, target, weight, sample_weight, o),)
    loss, _, *rest = _Recompute.apply(logits, target, weight, sample_weight, o)
    return (loss, *rest)


# ------------------------------------------------------------------------------------------------- function, module


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    class_dim: int | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    inplace_grad: bool = False,
    grad_in_forward: bool | None = None,
) -> Any:
    r"""Cross entropy between logits and targets; a drop-in for :func:`torch.nn.functional.cross_entropy`.

    With z the logits (scaled and capped, see below), lse = logsumexp(z) over the classes, class weights w and smoothing
    e, the loss of a row is ``(1-e) w_t (lse - z_t) + e/C sum_c w_c (lse - z_c)`` for a class index t, and
    ``-sum_c w_c ((1-e) p_c + e/C) (z_c - lse)`` for probabilities p.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16. Strides may be
            anything; with two or more spatial dimensions neither contiguous nor channels-last it is copied.
        target: class indices of shape (), (N) or (N, d1, ..., dK) and any integer dtype, or class probabilities of the
            input's shape and any floating dtype; sparse ones are made dense.
        weight: weight of each class, shape (C), any floating dtype. Differentiable with probability targets.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        ignore_index: class index that marks targets to leave out (index targets only).
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``. ``'mean'`` divides by the sum of ``weight[target]`` over the
            targets that count (index targets), or by the number of rows (probabilities).
        label_smoothing: e in [0, 1] (Szegedy et al., 2016).
        z_loss: adds ``z_loss * lse**2`` to every row that counts (PaLM, Chowdhery et al., 2022). Under ``'mean'`` this
            term is averaged over the targets that count, whatever their class weights.
        softcap: c > 0 replaces logits x by ``c * tanh(x / c)`` (Gemma 2).
        logit_scale: factor on the logits, before the cap (an inverse temperature).
        sample_weight: weight of each target, in the shape of an index target, any floating dtype, no gradient. It
            multiplies the row's loss; ``'mean'`` divides by the sum of ``sample_weight * weight[target]``
            (``sample_weight`` alone for probabilities).
        class_dim: dimension of the classes, if not 1 (0 for a 1-D input).
        all_ignored: mean over no counted target: ``'nan'`` as torch, or ``'zero'``.
        zero_times_inf: what weight or probability 0 times a logit of -inf gives: ``'nan'`` as torch, or ``'zero'``.
        return_stats: also return :class:`CrossEntropyStats` (log-sum-exp, arg-max, accuracy) from the same read.
        inplace_grad: let the gradient take the memory of ``input`` (scalar reductions): half the peak memory. The
            logits are overwritten in forward; any other use of them in backward then raises. Has no effect when
            no gradient is wanted or under torch.compile and torch.func.
        grad_in_forward: compute the gradient in forward (one read and one write of the logits in all) or recompute in
            backward (two reads and one write, nothing kept of the logits' size in between). None, the default, chooses
            forward for scalar reductions except for float16, where an unscaled gradient could underflow before the loss
            scale arrives.

    Returns:
        The loss: shape () or, for ``'none'``, that of an index target; the input's dtype (promoted with probabilities
        and their weight; float32 for 16-bit logits under autocast). With ``return_stats`` a pair (loss, stats).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index. On CUDA by a later call, see
            :func:`fastloss.set_error_mode`; until then its row has loss nan and gradient 0.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.

    Accumulates in float32 (float64 for float64) and rounds once; results are the same bit for bit from run to run and
    whatever the number of threads.
    """
    if has_torch_function_variadic(input, target, weight, sample_weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight, sample_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            sample_weight=sample_weight,
            class_dim=class_dim,
            all_ignored=all_ignored,
            zero_times_inf=zero_times_inf,
            return_stats=return_stats,
            inplace_grad=inplace_grad,
            grad_in_forward=grad_in_forward,
        )
    if size_average is not None or reduce is not None:
        reduction = _common.legacy_reduction(size_average, reduce)
    red = _common.reduction_code(reduction)

    _common.require_tensor("input", input, "cross_entropy")
    _common.require_tensor("target", target, "cross_entropy")
    if weight is not None:
        _common.require_tensor("weight", weight, "cross_entropy")
    if sample_weight is not None:
        _common.require_tensor("sample_weight", sample_weight, "cross_entropy")
    given = input
    soft = input.shape == target.shape
    if soft and target.layout is not torch.strided and target.is_floating_point():
        target = target.to_dense()
    ignore_index = _common.as_int("cross_entropy", "ignore_index", ignore_index)
    label_smoothing = _common.as_float("cross_entropy", "label_smoothing", label_smoothing)
    z_loss = _common.as_float("cross_entropy", "z_loss", z_loss)
    logit_scale = _common.as_float("cross_entropy", "logit_scale", logit_scale)
    softcap = None if softcap is None else _common.as_float("cross_entropy", "softcap", softcap)
    _common.require_supported_tensors("cross_entropy", input, target, weight, sample_weight)
    _common.require_same_device(
        "cross_entropy", ("input", input), ("target", target), ("weight", weight), ("sample_weight", sample_weight)
    )

    # Bring the classes to dimension 1 of [N, C, ...].
    class_dim = None if class_dim is None else _common.as_int("cross_entropy", "class_dim", class_dim)
    if class_dim is not None and (class_dim != 1 or input.dim() == 1):
        if not -input.dim() <= class_dim < input.dim():
            raise IndexError(
                f"Dimension out of range: class_dim is {class_dim}, but input has {input.dim()} dimensions"
            )
        if input.dim() > 1:
            input = input.movedim(class_dim, 1)
            target = target.movedim(class_dim, 1) if soft else target
    if soft:
        if not target.is_floating_point():
            raise RuntimeError(
                f"Expected floating point type for target with class probabilities, got {target.dtype}: target has the "
                f"shape of the input, {list(input.shape)}; class indices need {[*input.shape[:1], *input.shape[2:]]}"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"ignore_index is not supported for floating point target, got ignore_index={ignore_index}; give the "
                "rows to leave out a sample_weight of 0"
            )
    if input.dim() == 0:
        raise IndexError("Dimension specified as 1 but tensor has no dimensions: input needs shape (C), (N, C) or more")
    if label_smoothing != label_smoothing:  # torch takes nan for none
        label_smoothing = 0.0
    if label_smoothing < 0.0 or label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if all_ignored not in ("nan", "zero"):
        raise ValueError(f"all_ignored must be 'nan' or 'zero', got {all_ignored!r}")
    if zero_times_inf not in ("nan", "zero"):
        raise ValueError(f"zero_times_inf must be 'nan' or 'zero', got {zero_times_inf!r}")
    _rowwise.check_logits_dtype(input, "cross_entropy")

    single = input.dim() == 1
    if single:
        if not soft:
            _rowwise.check_single_target(target, "cross_entropy")
        single_shape = target.shape if not soft else ()
        input = input.unsqueeze(0)
        target = target.unsqueeze(0) if soft else target.reshape(1)
        if sample_weight is not None and sample_weight.numel() == 1:
            sample_weight = sample_weight.reshape(1)
    classes = input.shape[1]
    if soft:
        loss_dtype = torch.promote_types(input.dtype, target.dtype)
        if target.dtype not in DTYPE_CODES:
            raise NotImplementedError(f"cross_entropy(): probabilities of dtype {target.dtype} are not supported")
    else:
        _rowwise.check_index_shapes(input, target, "cross_entropy")
        _rowwise.check_index_dtype(target, "cross_entropy")
        loss_dtype = input.dtype
        target = _rowwise.index_target(target)
    accum = _common.accum_dtype(input.dtype)
    if weight is not None:
        if soft and not weight.is_floating_point() and not weight.is_complex():
            weight = weight.to(input.dtype)  # as torch, whose product promotes
        spatial = not soft and input.dim() > 2 and label_smoothing == 0
        _rowwise.check_weight(weight, classes, "cross_entropy", "cross_entropy: " if soft else "", any_shape=spatial)
        if soft:
            loss_dtype = torch.promote_types(loss_dtype, weight.dtype)
        elif weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy(): not differentiable with respect to argument 'weight' for class-index targets. This "
                "input cannot have requires_grad True; pass weight.detach()"
            )
        weight = weight.to(accum).flatten().contiguous()
    if classes == 0 and soft:  # nothing to sum over: 0, and 0 / 0 for the mean
        empty = (input.sum(1) + target.sum(1)).to(loss_dtype)
        if red != NONE:
            empty = empty.sum() * (float("nan") if red == MEAN else 1.0)
        if not return_stats:
            return empty.reshape(()) if single else empty
        raise ValueError("cross_entropy(return_stats=True): there is no arg-max over no classes; input has 0 classes")
    if sample_weight is not None:
        if not sample_weight.is_floating_point():
            raise RuntimeError(f"cross_entropy(): sample_weight must be floating point, got {sample_weight.dtype}")
        if list(sample_weight.shape) != _rowwise.row_shape(input):
            raise ValueError(
                f"cross_entropy(): sample_weight needs one weight per target, shape {_rowwise.row_shape(input)}, but "
                f"got {list(sample_weight.shape)}"
            )
        if sample_weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy(): not differentiable with respect to argument 'sample_weight'; pass it detached, or "
                "use reduction='none' and multiply"
            )
        sample_weight = sample_weight.to(accum).contiguous()
    loss_dtype = _common.autocast_dtype(loss_dtype, input.device)
    if inplace_grad and input.requires_grad and torch.is_grad_enabled():
        if any(t is not None and t.is_leaf and t.requires_grad for t in (given, given._base)):
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): input is a leaf that requires grad, or a view of one, and its "
                "memory cannot become its own gradient. inplace_grad is for logits that a model computed."
            )
        if not _common.is_dense(input):
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): elements of input share memory (an expanded tensor?) or do not fill "
                "it; pass input.contiguous()"
            )

    if single and not soft and input.is_cuda:
        all_ignored = "zero"  # torch's CUDA kernel gives 0 for a single ignored target, its CPU kernel nan
    flags = ALL_IGNORED_ZERO * (all_ignored == "zero") + ZERO_TIMES_INF * (zero_times_inf == "zero")
    options = _Options(
        red,
        DTYPE_CODES[loss_dtype],
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap) if softcap is not None else 0.0,
        float(logit_scale),
        0,
        [],
        flags + STATS * bool(return_stats),
    )
    loss, *stats = _run(input, target, weight, sample_weight, options, grad_in_forward, inplace_grad)
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    if single:
        loss = loss.reshape(())
        stats = [s.reshape(single_shape) for s in stats]
    return (loss, CrossEntropyStats(*stats)) if return_stats else loss


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Takes torch's constructor arguments and, keyword-only, those that :func:`cross_entropy` adds. ``weight`` is a
    buffer, so state dicts are interchangeable with torch's. ``sample_weight`` is an argument of the call.
    """

    # Of modules that were torch's before they became one of this class.
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        class_dim: int | None = None,
        all_ignored: Literal["nan", "zero"] = "nan",
        zero_times_inf: Literal["nan", "zero"] = "nan",
        return_stats: bool = False,
        inplace_grad: bool = False,
        grad_in_forward: bool | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options: dict[str, Any] = {
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "class_dim": class_dim,
            "all_ignored": all_ignored,
            "zero_times_inf": zero_times_inf,
            "return_stats": return_stats,
            "inplace_grad": inplace_grad,
            "grad_in_forward": grad_in_forward,
        }

    def extra_repr(self) -> str:
        """What goes beyond torch's module, where it differs from the default."""
        default = {"logit_scale": 1.0, "z_loss": 0.0, "all_ignored": "nan", "zero_times_inf": "nan"}
        shown = ((k, v) for k, v in self.options.items() if v != default.get(k) and v is not False)
        return ", ".join(f"{k}={v!r}" for k, v in shown)

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Any:
        """The loss of logits (N, C, ...) against targets; shapes, dtypes and errors as :func:`cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            **self.options,
        )
