"""Multi-label soft margin loss: binary cross entropy of logits, averaged over the classes.

The mathematics is that of ``BinaryCrossEntropyWithLogits`` in ``csrc/pointwise/losses/classification.h``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multilabel_soft_margin_loss as _composed  # torch's own, whatever patch() does later
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._autograd import accum_dtype
from .._library import DTYPE_CODES, MEAN, NONE, REDUCTIONS, SUM
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise

_KERNEL = "binary_cross_entropy_with_logits"


@recordable
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-label soft margin loss; a drop-in for :func:`torch.nn.functional.multilabel_soft_margin_loss`.

    The loss of a sample is the mean over its classes of ``-w (t log(sigmoid(x)) + (1 - t) log(sigmoid(-x)))``. It is
    finite at logits of any size, and computed from x, t and nothing else of their size.

    Args:
        input: logits x, shape (..., C); float32, float64, float16 or bfloat16, any strides.
        target: 1 where a class applies, else 0, or what lies between; broadcasts with the input. Differentiable.
        weight: weight of each class, shape (C), or whatever broadcasts with the input. Differentiable.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: of the samples: ``'none'`` | ``'mean'`` | ``'sum'``.

    Returns:
        The loss: shape () or, for ``'none'``, the input's without C; dtype promoted over the arguments.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError, TypeError, IndexError, NotImplementedError: as torch, to whose own composition arguments are left
            that broadcast the input or are no floating-point logits.

    Example::

        >>> loss = fastloss.multilabel_soft_margin_loss(logits, tags.float(), weight=1 / frequency)
    """
    operands = (input, target, weight)
    if has_torch_function_variadic(*operands):
        options: dict[str, Any] = {
            "weight": weight,
            "size_average": size_average,
            "reduce": reduce,
            "reduction": reduction,
        }
        return handle_torch_function(multilabel_soft_margin_loss, operands, input, target, **options)
    if recording():
        return record("multilabel_soft_margin_loss", locals())
    name = "multilabel_soft_margin_loss"
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if reduction == "mean" and weight is None:
        result = _pointwise.usual(_KERNEL, input, target, reduction)
        if result is not None and input.dim():
            return result
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not valid: expected 'none', 'mean' or 'sum'")
    _arguments.require_tensor("input", input, name)
    _arguments.require_tensor("target", target, name)
    if weight is not None:
        _arguments.require_tensor("weight", weight, name)
    _arguments.require_supported_tensors(name, *operands)
    if not _fits(input, target, weight):
        return _composed(input, target, weight, reduction=reduction)
    dtype = input.dtype
    for t in (target, weight):
        if t is not None and t.is_floating_point() and t.dim():
            dtype = torch.promote_types(dtype, t.dtype)
    if weight is not None and not weight.is_floating_point():
        weight = weight.to(accum_dtype(dtype))
    target = target if target.is_floating_point() else target.to(input.dtype)
    code = REDUCTIONS[reduction]
    if code == SUM:  # over the samples, of means: as a mean of so many times the loss
        samples = input.shape[:-1].numel()
        weight = torch.ones((), dtype=accum_dtype(dtype), device=input.device) if weight is None else weight
        weight = weight.to(accum_dtype(dtype)) * samples
    weight = None if weight is None else weight.expand(input.shape)
    x = _pointwise.Operands(input, target.expand(input.shape), weight, None, code, 0.0, dtype)
    if code == NONE:
        return _pointwise.loss_of_groups(_KERNEL, x, [input.dim() - 1], (0.0,), inner=MEAN)
    return _pointwise.run_checked(x._replace(reduction=MEAN), _KERNEL, (0.0,))


def _fits(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels take it: the loss has the input's shape, and everything may be read as floats."""
    if not 1 <= input.dim() <= _pointwise.MAX_DIMS or input.dtype not in DTYPE_CODES:
        return False
    for t in (target, weight):
        if t is None:
            continue
        if t.is_complex() or t.dtype is torch.bool or (t.is_floating_point() and t.dtype not in DTYPE_CODES):
            return False
        if t.device != input.device:
            return False
        try:
            if torch.broadcast_shapes(input.shape, t.shape) != input.shape:
                return False
        except RuntimeError:
            return False
    return True


class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    """:func:`multilabel_soft_margin_loss` as a module; a drop-in for :class:`torch.nn.MultiLabelSoftMarginLoss`."""

    __prepare_scriptable__ = not_scriptable

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (..., C) against targets; as :func:`multilabel_soft_margin_loss`."""
        return multilabel_soft_margin_loss(input, target, weight=self.weight, reduction=self.reduction)
