"""Absolute error relative to the target. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._library import DTYPE_CODES
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def relative_l1_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    eps: float | None = None,
    symmetric: bool = False,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Relative absolute error ``|1 - input / target|`` ("percentage error"), finite where the target is 0.

    It is computed as ``|input - target| / max(|target|, eps)``, so a target nearer to 0 than ``eps`` is divided by
    ``eps`` instead (scikit-learn's convention). ``symmetric=True`` divides by ``max((|input| + |target|) / 2, eps)``
    (symmetric percentage error, between 0 and 2). Differentiable in both arguments; the gradient is 0 where they are
    equal.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        eps: positive; by default the machine epsilon of the promoted dtype (float16: 1e-3, bfloat16: 8e-3, float32:
            1e-7, float64: 2e-16). A target of 0 costs ``|input| / eps`` and its gradient is ``1 / eps``: choose the
            smallest target that means something.
        symmetric: see above.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast). A fraction: times 100 it is in percent.

    Raises:
        ValueError: eps not positive and finite.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            relative_l1_loss,
            (input, target),
            input,
            target,
            reduction=reduction,
            eps=eps,
            symmetric=symmetric,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording():
        return record("relative_l1_loss", locals())
    return run("relative_l1_loss", input, target, reduction, eps, symmetric, weight, sample_weight, mask)


def run(
    function: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    eps: float | None,
    symmetric: bool,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The loss under each of its names, ``function``."""
    if eps is None:
        eps = 1.0
        if isinstance(input, Tensor) and isinstance(target, Tensor):
            dtype = torch.promote_types(input.dtype, target.dtype)
            eps = torch.finfo(dtype).eps if dtype in DTYPE_CODES else 1.0  # other dtypes are refused below
    eps = _arguments.as_float(function, "eps", eps)
    if not 0 < eps < float("inf"):
        raise ValueError(
            f"{function}(): eps must be positive, or a target of 0 would divide by it, and finite; got {eps}"
        )
    params = float(eps), float(bool(symmetric))
    return pointwise_loss(
        function, input, target, reduction, weight, sample_weight, mask, loss="relative_l1_loss", params=params
    )


class RelativeL1Loss(torch.nn.Module):
    """:func:`relative_l1_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean", *, eps: float | None = None, symmetric: bool = False) -> None:
        super().__init__()
        self.reduction, self.eps, self.symmetric = reduction, eps, symmetric

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`relative_l1_loss`."""
        return relative_l1_loss(
            input,
            target,
            self.reduction,
            eps=self.eps,
            symmetric=self.symmetric,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
