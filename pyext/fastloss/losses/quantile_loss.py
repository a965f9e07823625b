"""Quantile (pinball) loss. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._autograd import accum_dtype
from .._library import DTYPE_CODES
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss, require


@recordable
def quantile_loss(
    input: Tensor,
    target: Tensor,
    quantile: Tensor | float | None = 0.5,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Quantile loss, or pinball loss (Koenker & Bassett, 1978): ``q (t - x)`` where the target t is above the
    prediction x, ``(1 - q)(x - t)`` where it is below.

    Its minimum over x is the q-quantile of t. The gradient is 0 where they are equal.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides. For several quantiles the
            last dimension is theirs: (..., Q).
        target: true values in the input's shape; another is broadcast, with a warning, and without a copy. For several
            quantiles (...), or what broadcasts to (..., Q), without a warning.
        quantile: q between 0 and 1, or a tensor of Q of them.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``. Quantiles
            are elements like others.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError: a quantile outside (0, 1); as a tensor on CUDA, whose values are not looked at, it makes the loss
            nan. Quantiles whose number is not that of the input's last dimension.
        ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError: as :func:`fastloss.mse_loss`.

    Example, a median and an interval of 80 %::

        >>> loss = fastloss.quantile_loss(forecast, demand, torch.tensor([0.1, 0.5, 0.9]))  # (N, 3) against (N)
    """
    name = "quantile_loss"
    if has_torch_function_variadic(input, target, quantile):
        options: dict[str, Any] = {
            "reduction": reduction,
            "weight": weight,
            "sample_weight": sample_weight,
            "mask": mask,
        }
        return handle_torch_function(
            quantile_loss, (input, target, quantile), input, target, quantile=quantile, **options
        )
    if recording():
        return record("quantile_loss", locals())
    if not isinstance(quantile, Tensor):
        quantile = _arguments.as_float(name, "quantile", quantile)
        if not 0 < quantile < 1:
            raise ValueError(f"{name}(): quantile must be between 0 and 1, and neither, got {quantile}")
        return pointwise_loss(name, input, target, reduction, weight, sample_weight, mask, params=(quantile,))
    require(name, "input", input)
    require(name, "target", target)
    q = _quantiles(name, input, quantile)
    if q.dim():
        if input.shape[-1:] != q.shape:
            raise ValueError(
                f"{name}(): input needs a last dimension of {q.numel()} quantiles, but has shape {list(input.shape)}"
            )
        if target.dim() == input.dim() - 1:
            target = target.unsqueeze(-1)
        try:
            target = target.expand(input.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}(): target of shape {list(target.shape)} does not broadcast to the input's shape "
                f"{list(input.shape)}, whose last dimension is that of the quantiles"
            ) from None
    further = {"quantile": q}
    return pointwise_loss(
        name, input, target, reduction, weight, sample_weight, mask, loss="quantiles_loss", further=further
    )


def _quantiles(name: str, input: Tensor, quantile: Tensor) -> Tensor:
    """The quantiles as an operand, which does not raise the loss's dtype."""
    dtype = accum_dtype(input.dtype)
    if quantile.dim() > 1 or not quantile.is_floating_point() or quantile.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{name}(): quantile must be a number or a tensor of shape (Q) of floating dtype, got {quantile.dtype} of "
            f"shape {list(quantile.shape)}"
        )
    q = quantile.detach().to(dtype)
    inside = (q > 0) & (q < 1)
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_symbolic(q) and not inside.all():
        raise ValueError(f"{name}(): quantile must be between 0 and 1, and neither, got {quantile.tolist()}")
    return torch.where(inside, q, torch.nan)


def _is_symbolic(t: Tensor) -> bool:
    """Whether its values cannot be looked at."""
    return type(t) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active()


class QuantileLoss(torch.nn.Module):
    """:func:`quantile_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    quantile: Tensor | float

    def __init__(self, quantile: Tensor | float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        if isinstance(quantile, Tensor):
            self.register_buffer("quantile", quantile)
        else:
            self.quantile = quantile
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`quantile_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return quantile_loss(input, target, self.quantile, self.reduction, **options)
