"""Negative log likelihood of given log-probabilities. One element per row is read; backward writes each element once.

The mathematics is in ``csrc/rowwise/row_losses.h``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _row_loss


@recordable
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood loss; a drop-in for :func:`torch.nn.functional.nll_loss`.

    The loss of a row with class index t is ``-w_t * input_t``. For logits use :func:`fastloss.cross_entropy`, which
    needs no log-probabilities in memory.

    Args:
        input: log-probabilities, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype.
        weight: weight of each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        ignore_index: class index that marks targets to leave out, or several in a list.
        reduction: ``'none'`` | ``'mean'`` (divided by the sum of ``weight[target]`` over the counted) | ``'sum'``.

    Returns:
        The loss, in the input's dtype (float32 for 16-bit input under autocast).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; on CUDA by a later call, see
            :func:`fastloss.set_error_mode`.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(nll_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("nll_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    return _row_loss.run("nll_loss", input, target, weight, reduction, ignore_index=ignore_index, same_dtype=True)


class NLLLoss(torch.nn.NLLLoss):
    """:func:`nll_loss` as a module; a drop-in for :class:`torch.nn.NLLLoss`."""

    __prepare_scriptable__ = not_scriptable

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of log-probabilities (N, C, ...) against class indices; as :func:`nll_loss`."""
        return nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
