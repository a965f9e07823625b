"""Margin ranking loss of pairs of scores. The mathematics is in ``csrc/pointwise/losses/classification.h``."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise

_POSITIONAL = ("input1", "input2", "target", "operands")


@recordable
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Margin ranking loss; a drop-in for :func:`torch.nn.functional.margin_ranking_loss`.

    The loss of two scores is ``max(0, -target * (input1 - input2) + margin)``: 0 where they are in order, with a
    margin. Exactly there its slope is that of the pairs that are not, as torch's.

    Args:
        input1, input2: scores, any shape; float32, float64, float16 or bfloat16, any strides. Differentiable.
        target: 1 where the first is to be higher, -1 where the second is, floating or integer. A floating one is
            differentiable.
            The three have the same number of dimensions and are broadcast, without a copy.
        margin: by how much.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over the three (float32 for 16-bit
        ones under autocast).

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError: as torch, for sizes, dtypes and
            arguments.

    Example, answers that were preferred to others::

        >>> loss = fastloss.margin_ranking_loss(chosen, rejected, torch.ones_like(chosen), margin=0.5)
    """
    operands = (input1, input2, target)
    if has_torch_function_variadic(*operands):
        options = {key: value for key, value in locals().items() if key not in _POSITIONAL}
        return handle_torch_function(margin_ranking_loss, operands, *operands, **options)
    if recording():
        return record("margin_ranking_loss", locals())
    name = "margin_ranking_loss"
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    code = _arguments.reduction_code(reduction)
    for argument, t in zip(("input1", "input2", "target"), operands, strict=True):
        _pointwise.require(name, argument, t)
    if not input1.dim() == input2.dim() == target.dim():
        raise RuntimeError(
            "margin_ranking_loss : All input tensors should have same dimension but got sizes: "
            f"input1: {input1.size()}, input2: {input2.size()}, target: {target.size()} "
        )
    if torch.bool in (input1.dtype, input2.dtype, target.dtype):
        raise RuntimeError(f"{name}(): subtraction with a bool tensor is not supported; convert it to a number")
    dtype = torch.promote_types(torch.promote_types(input1.dtype, input2.dtype), target.dtype)
    if not input1.shape == input2.shape == target.shape:
        input1, input2, target = _pointwise.broadcast(input1, input2, target)
    names = ("input1", "input2")
    weights = (weight, sample_weight, mask)
    x = _pointwise.checked(name, input1, input2, ("none", "mean", "sum")[code], *weights, broadcasts=True, names=names)
    if _arguments.is_integral(target):
        target = target.to(x.input.dtype)
    x = _pointwise.with_further(name, x, {"target": target})
    if dtype.is_floating_point:  # what is broadcast may be of another by now
        x = x._replace(dtype=_arguments.autocast_dtype(dtype, input1.device))
    return _pointwise.run_checked(x, name, (float(_arguments.as_float(name, "margin", margin)),))


class MarginRankingLoss(torch.nn.MarginRankingLoss):
    """:func:`margin_ranking_loss` as a module; a drop-in for :class:`torch.nn.MarginRankingLoss`.

    Weights and mask are arguments of the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of pairs of scores; shapes, dtypes and errors as :func:`margin_ranking_loss`."""
        return margin_ranking_loss(
            input1,
            input2,
            target,
            margin=self.margin,
            reduction=self.reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
