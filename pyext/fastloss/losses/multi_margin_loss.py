"""Multi-class margin loss: a hinge for every class whose score is not a margin below the target's.

The mathematics is in ``csrc/rowwise/row_losses.h``.
"""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _row_loss


@recordable
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-class margin loss; a drop-in for :func:`torch.nn.functional.multi_margin_loss`.

    The loss of a row with class index t is ``w_t * sum(max(0, margin - input_t + input_c)**p for c != t) / C``.

    Args:
        input: scores, shape (C), (N, C) or, beyond torch, (N, C, d1, ..., dK); float32, float64, float16 or bfloat16.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype.
        p: 1 or 2.
        margin: by how much the target's score should exceed the others.
        weight: weight of each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the number of rows) | ``'sum'``.

    Returns:
        The loss, in the input's dtype (float32 for 16-bit input under autocast).

    Raises:
        RuntimeError: a target outside [0, C); on CUDA an IndexError, by a later call, see
            :func:`fastloss.set_error_mode`.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(multi_margin_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("multi_margin_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    name = "multi_margin_loss"
    if reduction != "elementwise_mean":  # of which run() warns
        _arguments.reduction_code(reduction)
    if p != 1 and p != 2:
        raise ValueError(f"only p == 1 and p == 2 supported, got {p}")
    if isinstance(weight, Tensor) and weight.dim() != 1:
        raise ValueError(f"weight must be one-dimensional, with an element for each class, got {list(weight.shape)}")
    _arguments.require_tensor("input", input, name)
    _arguments.require_tensor("target", target, name)
    _arguments.refuse_strided_nested(name, input, target)
    if input.dim() == 0:
        input = input.reshape(1)  # a row of one class
    classes, rows = input.shape[min(input.dim() - 1, 1)], list(input.shape[:1]) if input.dim() > 1 else [1]
    if classes == 0:
        raise RuntimeError(
            f"Expected non-empty vector or matrix with optional 0-dim batch size, but got: {list(input.shape)}. "
            f"{name}(): input has no classes"
        )
    if input.dim() < 3 and (target.numel() != rows[0] or target.dim() > 1):
        raise RuntimeError(
            f"{name}: target tensor should be 1-D with size equal to the number of input samples (batch size). "
            f"Expected target size {rows}, but got {list(target.shape)}. Input has shape {list(input.shape)}."
        )
    if isinstance(weight, Tensor) and weight.numel() != classes:
        raise RuntimeError(
            f"inconsistent weight size, expected {classes} but got {list(weight.shape)}. {name}(): weight needs an "
            "element for each class"
        )
    if target.is_floating_point():
        raise RuntimeError(
            f"expected scalar type Long but found {_row_loss.SCALAR_TYPES.get(target.dtype, target.dtype)}. {name}(): "
            "target holds class indices; call target.long()"
        )
    params = (float(p), _arguments.as_float(name, "margin", margin))
    flags = _row_loss.MEAN_OVER_ROWS | _row_loss.IGNORES_NOTHING
    shape = target.shape  # of one row it may be () or (1), in torch and so here
    if input.dim() == 2 and not shape:
        target = target.reshape(1)
    try:
        loss = _row_loss.run(name, input, target, weight, reduction, params=params, flags=flags, same_dtype=True)
    except IndexError as error:  # torch's other losses over classes raise that
        if not input.is_cpu:  # it may be of an earlier call
            raise
        raise RuntimeError(f"target out of range. {error}") from None
    return loss.reshape(shape) if reduction == "none" and input.dim() < 3 else loss


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """:func:`multi_margin_loss` as a module; a drop-in for :class:`torch.nn.MultiMarginLoss`."""

    __prepare_scriptable__ = not_scriptable

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (N, C, ...) against class indices; as :func:`multi_margin_loss`."""
        return multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction
        )
