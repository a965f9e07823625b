"""Poisson negative log likelihood of counts. The mathematics is in ``csrc/pointwise/losses/distributions.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Negative log likelihood of Poisson counts; a drop-in for :func:`torch.nn.functional.poisson_nll_loss`.

    The loss of a count t is ``exp(x) - t x``, x the logarithm of the expected count; with ``log_input=False``, x the
    expected count itself, ``x - t log(x + eps)``.

    Args:
        input: expectations, any shape; float32, float64, float16 or bfloat16, any strides. (Integers are taken as
            numbers of the default dtype.)
        target: counts, floating or integer; another shape is broadcast, without a copy. Differentiable.
        log_input: see above.
        full: add what depends on the target alone, Stirling's ``t log(t) - t + log(2 pi t) / 2`` where t > 1. (Its
            derivative by a target of 0 or less is nan, as torch's.)
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        eps: see above.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast). In nats, and without ``full`` shifted by what no expectation changes.

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: as torch, for sizes, dtypes and arguments.

    Example, visits in each hour::

        >>> loss = fastloss.poisson_nll_loss(log_rates, visits)
    """
    name = "poisson_nll_loss"
    if has_torch_function_variadic(input, target):
        options = {key: value for key, value in locals().items() if key not in ("name", "input", "target")}
        return handle_torch_function(poisson_nll_loss, (input, target), input, target, **options)
    if recording():
        return record("poisson_nll_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if reduction == "elementwise_mean":  # which this one does not know
        raise ValueError("elementwise_mean is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    if _arguments.is_integral(input):
        input = input.to(torch.get_default_dtype())  # what exp and log make of it, whatever the target is
    params = (float(bool(log_input)), float(bool(full)), float(_arguments.as_float(name, "eps", eps)))
    return pointwise_loss(name, input, target, reduction, weight, sample_weight, mask, params=params, broadcasts=True)


class PoissonNLLLoss(torch.nn.PoissonNLLLoss):
    """:func:`poisson_nll_loss` as a module; a drop-in for :class:`torch.nn.PoissonNLLLoss`.

    Weights and mask are arguments of the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        log_input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of expectations against counts; shapes, dtypes and errors as :func:`poisson_nll_loss`."""
        return poisson_nll_loss(
            log_input,
            target,
            self.log_input,
            self.full,
            eps=self.eps,
            reduction=self.reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
