"""Kullback-Leibler divergence, element by element. The mathematics is in ``csrc/pointwise/losses/distributions.h``."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss

_MEAN = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size."
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
    "'mean' will be changed to behave the same as 'batchmean' in the next major release."
)


@recordable
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of log-probabilities from a target; as :func:`torch.nn.functional.kl_div`.

    The loss of an element is ``t (log(t) - x)``, 0 where t is 0, or ``exp(t) (t - x)`` with ``log_target=True``. Summed
    over classes it is the divergence of the distribution t from the one that x is the logarithm of.

    Args:
        input: log-probabilities x, any shape; float32, float64, float16 or bfloat16, any strides.
        target: probabilities t, or their logarithms, floating; another shape is broadcast, without a copy.
            Differentiable. (The derivative by a probability of 0 is nan, as torch's.)
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the number of elements, with torch's warning, or by the sum of
            the weights) | ``'sum'`` | ``'batchmean'`` (the sum divided by the input's first size, whatever is weighted
            or masked).
        log_target: see above. A log-probability of -inf gives nan, as torch's.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss in nats: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target
        (float32 for 16-bit ones under autocast).

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: integer or complex operands, shapes that do not broadcast.
        TypeError, NotImplementedError: as torch, for other arguments.

    Example, a student that learns from a teacher::

        >>> loss = fastloss.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    """
    name = "kl_div"
    if has_torch_function_variadic(input, target):
        options = {key: value for key, value in locals().items() if key not in ("name", "input", "target")}
        return handle_torch_function(kl_div, (input, target), input, target, **options)
    if recording():
        return record("kl_div", locals())
    by_batch = isinstance(reduction, str) and reduction == "batchmean"
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    elif by_batch:
        reduction = "sum"
    elif reduction == "mean":
        _arguments.warn(_MEAN)
    if isinstance(input, Tensor) and isinstance(target, Tensor):
        if input.is_complex() or target.is_complex():
            raise RuntimeError("kl_div: Complex inputs not supported.")
        if not (input.is_floating_point() and target.is_floating_point()):
            raise RuntimeError("kl_div: Integral inputs not supported. Call .float() on what holds integers.")
    size, share, divisor = 1, 1.0, 1
    if by_batch and isinstance(input, Tensor) and input.dim():
        size = input.shape[0]
        if torch.compiler.is_compiling() or not size:  # a size that may be another one in the next call
            divisor = size
        else:
            share = 1 / size
    params = (float(bool(log_target)), share)
    loss = pointwise_loss(name, input, target, reduction, weight, sample_weight, mask, params=params, broadcasts=True)
    return loss if size == 1 or share != 1.0 else loss / divisor


class KLDivLoss(torch.nn.KLDivLoss):
    """:func:`kl_div` as a module; a drop-in for :class:`torch.nn.KLDivLoss`.

    Weights and mask are arguments of the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of log-probabilities against a target; shapes, dtypes and errors as :func:`kl_div`."""
        return kl_div(
            input,
            target,
            reduction=self.reduction,
            log_target=self.log_target,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
