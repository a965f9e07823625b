"""Cross entropy: log-softmax and negative log likelihood in one pass over the logits.

The mathematics is in ``csrc/rowwise/cross_entropy.h``, its composed form in ``fastloss/formulas.py``. This file says
what the operators take (:class:`_CrossEntropy`, of which the engine makes autograd) and checks arguments. The fused
gradient costs one read and one write of the logits in all; recomputing reads them twice and keeps two numbers per row.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, errors, formulas
from .._autograd import Engine, Grads, Needs, Outcome, Path, Rules, Tensors, accum_dtype
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE, loop_vmap, ops
from ..formulas import ALL_IGNORED_ZERO, ZERO_TIMES_INF
from . import _rowwise

# The other bits of `flags`, as in cross_entropy_torch.cpp.
SAVE, GRAD, STATS = 1, 2, 16


class CrossEntropyStats(NamedTuple):
    """What ``return_stats=True`` adds, from the same read of the logits. No gradient flows through it.

    Attributes:
        lse: log-sum-exp of each row of (scaled, capped) logits, shape of an index target, float32 (float64 for float64
            logits).
        argmax: predicted class, int64, shape of an index target.
        accuracy: share of the counted targets that were predicted right, float32, shape (). For probability targets the
            wanted class is their arg-max.
    """

    lse: Tensor
    argmax: Tensor
    accuracy: Tensor


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    reduction: int
    loss_dtype: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    row_map: int = 0  # 0: none
    map_a: float = 0.0
    map_b: float = 0.0
    flags: int = 0


def _call(op: Any, before: Sequence[Any], tensors: Tensors, o: Options, flags: int = 0, saved: Any = ()) -> Any:
    return op(*before, *tensors[:4], *saved, *o[:7], o.flags | flags)


class _CrossEntropy(Rules):
    """Operands: logits, target, weight, sample_weight, normalizer. The first three may have gradients."""

    name, tensors, wants, options = "cross_entropy", 5, 3, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        if o.flags & STATS:
            loss, _, _, *stats = _call(ops.cross_entropy_forward_stats, (), tensors, o)
            return (loss, *stats)
        return (_call(ops.cross_entropy_forward, (), tensors, o)[0],)

    def forward(self, tensors: Tensors, o: Options, needs: Needs | None) -> Outcome:
        op = ops.cross_entropy_forward_stats if o.flags & STATS else ops.cross_entropy_forward
        loss, saved, grad, *stats = _call(op, (), tensors, o, SAVE if needs is None else GRAD)
        return Outcome(loss, saved, (grad, None, None), tuple(stats))

    def in_place(self, tensors: Tensors, o: Options) -> Outcome:
        loss, *stats = _call(ops.cross_entropy_forward_inplace, (), tensors, o)
        return Outcome(loss, stats=tuple(stats) if o.flags & STATS else ())

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        logits, target, weight, sample_weight, normalizer = tensors
        g = (grad_output.contiguous(),)
        grad = _call(ops.cross_entropy_backward, g, tensors, o, saved=(saved,)) if needs[0] else None
        of_target = ops.cross_entropy_target_backward
        grad_target = _call(of_target, g, tensors, o, saved=(saved,)) if needs[1] else None
        grad_weight = None
        if needs[2]:  # with unit weights and no smoothing the probabilities' gradient is u (lse - z)
            wide = target.detach().to(weight.dtype)  # detach: no tangent
            plain = (logits, wide, None, sample_weight, normalizer)
            per_class = _call(of_target, g, plain, o._replace(label_smoothing=0.0), saved=(saved,))
            q = formulas.smoothed(wide, o)
            grad_weight = formulas.sum_rows(formulas.product(q, per_class, o), weight)
        return grad, grad_target, grad_weight

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        return formulas.cross_entropy(tensors, o)

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: Options, needs: Needs) -> Grads:
        if o.row_map:
            return super().gradients(grad_output, tensors, o, needs)
        return formulas.cross_entropy_gradients(grad_output, tensors, o, needs)

    def tangent(self, tensors: Tensors, tangents: Sequence[Tensor | None], o: Options) -> Tensor:
        return (
            super().tangent(tensors, tangents, o) if o.row_map else formulas.cross_entropy_tangent(tensors, tangents, o)
        )

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        logits, target, weight = tensors[:3]
        others = target.requires_grad or (weight is not None and weight.requires_grad)
        return o.reduction != NONE and logits.requires_grad and not others

    def regime(self, tensors: Tensors, o: Options, grads: bool) -> str:
        transform = o.softcap, o.logit_scale
        return ops.cross_entropy_regime(*tensors[:2], o.label_smoothing, *transform, o.flags | (GRAD if grads else 0))

    def operators(self, path: Path, o: Options, needs: Needs) -> tuple[tuple[str, ...], tuple[str, ...]]:
        stats = "_stats" if o.flags & STATS else ""
        if path is Path.VALUE:
            return ("cross_entropy_forward_stats" if stats else "cross_entropy_value",), ()
        if path is Path.IN_PLACE:
            return ("cross_entropy_forward_inplace",), ("scale_grad_",)
        forward = (f"cross_entropy_forward{stats}",)
        if path is Path.FUSED:
            return forward, ("scale_grad_",)
        backward = ("cross_entropy_backward", "cross_entropy_target_backward", "cross_entropy_target_backward")
        return forward, tuple(name for name, needed in zip(backward, needs, strict=True) if needed)


# --------------------------------------------------------------------------------------------------- fake kernels, vmap


def _fake_loss(logits: Tensor, o: Options) -> Tensor:
    shape = _rowwise.row_shape(logits) if o.reduction == NONE else []
    return logits.new_empty(shape, dtype=DTYPES[o.loss_dtype])


def _fake_forward(logits: Tensor, target: Tensor, o: Options) -> tuple[Tensor, ...]:
    saved = grad = None
    if o.flags & SAVE:
        rows = 1
        for n in _rowwise.row_shape(logits):
            rows = rows * n
        count = (3 if target.is_floating_point() else 2) * rows + 2
        saved = logits.new_empty([count], dtype=accum_dtype(logits.dtype))
    if o.flags & GRAD:
        grad = torch.empty_like(logits)
    nothing = (logits.new_empty([0], dtype=torch.float32) for _ in range(2))
    return (_fake_loss(logits, o), *(n if t is None else t for t, n in zip((saved, grad), nothing, strict=True)))


def _fake_stats(logits: Tensor) -> tuple[Tensor, ...]:
    shape, accum = _rowwise.row_shape(logits), accum_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=accum),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty([], dtype=torch.float32),
    )


def _options(rest: Sequence[Any]) -> Options:
    *options, flags = rest
    return Options(*options)._replace(flags=flags)


@torch.library.register_fake("fastloss::cross_entropy_forward")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, *rest: Any) -> Any:
    return _fake_forward(logits, target, _options(rest))


@torch.library.register_fake("fastloss::cross_entropy_forward_stats")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, *rest: Any) -> Any:
    return (*_fake_forward(logits, target, _options(rest)), *_fake_stats(logits))


@torch.library.register_fake("fastloss::cross_entropy_forward_inplace")
def _(logits: Any, target: Any, weight: Any, sample_weight: Any, *rest: Any) -> Any:
    o = _options(rest)
    if o.flags & STATS:
        return (_fake_loss(logits, o), *_fake_stats(logits))
    return (_fake_loss(logits, o), *(logits.new_empty([0], dtype=torch.float32) for _ in range(3)))


@torch.library.register_fake("fastloss::cross_entropy_backward")
def _(grad_output: Any, logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


@torch.library.register_fake("fastloss::cross_entropy_target_backward")
def _(grad_output: Any, logits: Any, target: Any, *rest: Any) -> Any:
    return torch.empty_like(target)


for _name in ("forward", "forward_stats", "backward", "target_backward"):
    torch.library.register_vmap(f"fastloss::cross_entropy_{_name}", loop_vmap(getattr(ops, f"cross_entropy_{_name}")))

_engine = Engine(_CrossEntropy(), stats=3)


# ----------------------------------------------------------------------------------------------------- function, module


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
        reduction = _arguments.legacy_reduction(size_average, reduce)
    red = _arguments.reduction_code(reduction)

    _arguments.require_tensor("input", input, "cross_entropy")
    _arguments.require_tensor("target", target, "cross_entropy")
    if weight is not None:
        _arguments.require_tensor("weight", weight, "cross_entropy")
    if sample_weight is not None:
        _arguments.require_tensor("sample_weight", sample_weight, "cross_entropy")
    given = input
    soft = input.shape == target.shape
    if soft and target.layout is not torch.strided and target.is_floating_point():
        target = target.to_dense()
    ignore_index = _arguments.as_int("cross_entropy", "ignore_index", ignore_index)
    label_smoothing = _arguments.as_float("cross_entropy", "label_smoothing", label_smoothing)
    z_loss = _arguments.as_float("cross_entropy", "z_loss", z_loss)
    logit_scale = _arguments.as_float("cross_entropy", "logit_scale", logit_scale)
    softcap = None if softcap is None else _arguments.as_float("cross_entropy", "softcap", softcap)
    _arguments.require_supported_tensors("cross_entropy", input, target, weight, sample_weight)
    _arguments.require_same_device(
        "cross_entropy", ("input", input), ("target", target), ("weight", weight), ("sample_weight", sample_weight)
    )

    # Bring the classes to dimension 1 of [N, C, ...].
    class_dim = None if class_dim is None else _arguments.as_int("cross_entropy", "class_dim", class_dim)
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
        if not _rowwise.mergeable(input, target):
            input, target = input.contiguous(), target.contiguous()
    else:
        _rowwise.check_index_shapes(input, target, "cross_entropy")
        _rowwise.check_index_dtype(target, "cross_entropy")
        loss_dtype = input.dtype
        target = _rowwise.index_target(target)
        if not _rowwise.mergeable(input):
            input = input.contiguous()
    accum = accum_dtype(input.dtype)
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
    loss_dtype = _arguments.autocast_dtype(loss_dtype, input.device)
    if inplace_grad and input.requires_grad and torch.is_grad_enabled():
        if any(t is not None and t.is_leaf and t.requires_grad for t in (given, given._base)):
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): input is a leaf that requires grad, or a view of one, and its "
                "memory cannot become its own gradient. inplace_grad is for logits that a model computed."
            )
        if not _arguments.is_dense(input):
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): elements of input share memory (an expanded tensor?) or do not fill "
                "it; pass input.contiguous()"
            )

    if single and not soft and input.is_cuda:
        all_ignored = "zero"  # torch's CUDA kernel gives 0 for a single ignored target, its CPU kernel nan
    flags = ALL_IGNORED_ZERO * (all_ignored == "zero") + ZERO_TIMES_INF * (zero_times_inf == "zero")
    options = Options(
        red,
        DTYPE_CODES[loss_dtype],
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap) if softcap is not None else 0.0,
        float(logit_scale),
        flags=flags + STATS * bool(return_stats),
    )
    tensors = (input, target, weight, sample_weight, None)
    loss, *stats = _engine(tensors, options, in_forward=grad_in_forward, in_place=inplace_grad, stats=return_stats)
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
