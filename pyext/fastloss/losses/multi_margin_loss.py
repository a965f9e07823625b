"""Multi-class margin loss: hinges for all classes whose score is not a margin below the target's.

The mathematics is in ``csrc/rowwise/row_losses.h``.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from . import _row_loss


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
        IndexError: a target outside [0, C); on CUDA by a later call, see :func:`fastloss.set_error_mode`.
        ValueError: p neither 1 nor 2; a weight that is not one-dimensional.
        ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`fastloss.nll_loss`.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(multi_margin_loss, (input, target, weight), input, target, **options)
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if p != 1 and p != 2:
        raise ValueError(f"only p == 1 and p == 2 supported, got {p}")
    if isinstance(weight, Tensor) and weight.dim() != 1:
        raise ValueError(f"weight must be one-dimensional, with an element for each class, got {list(weight.shape)}")
    params = (float(p), _arguments.as_float("multi_margin_loss", "margin", margin))
    flags = _row_loss.MEAN_OVER_ROWS | _row_loss.IGNORES_NOTHING
    return _row_loss.run(
        "multi_margin_loss", input, target, weight, reduction, params=params, flags=flags, same_dtype=True
    )


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """:func:`multi_margin_loss` as a module; a drop-in for :class:`torch.nn.MultiMarginLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (N, C, ...) against class indices; as :func:`multi_margin_loss`."""
        return multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction
        )
