"""Binary cross entropy of probabilities. The mathematics is in ``csrc/pointwise/losses/classification.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._library import DTYPE_CODES
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise
from ._pointwise import Operands
from ._row_loss import SCALAR_TYPES

_NAME = "binary_cross_entropy"
# As torch's messages call them.
_KINDS = {**SCALAR_TYPES, torch.int64: "Long", torch.int32: "Int", torch.uint8: "Byte", torch.bool: "Bool"}


@recordable
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of probabilities; a drop-in for :func:`torch.nn.functional.binary_cross_entropy`.

    The loss of an element is ``-w (t max(log(x), -100) + (1 - t) max(log(1 - x), -100))``: at most 100, as torch's,
    also where x says the opposite of t for certain. Its derivative there is 1e12. Where x comes from a sigmoid,
    :func:`fastloss.binary_cross_entropy_with_logits` keeps the digits that a probability near 1 has lost.

    Args:
        input: probabilities x between 0 and 1, any shape; float32, float64, float16 or bfloat16, any strides.
        target: probabilities t between 0 and 1 in the input's shape and dtype. Differentiable.
        weight: weight of each element, any shape that broadcasts to the input's (per class, per row, a number), without
            a copy. Differentiable (torch refuses that).
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the number of elements that count, whatever their weights, as
            torch does) | ``'sum'``.
        sample_weight: weight of each sample, shape (N) for input (N, ...), no gradient; multiplies ``weight``.
        mask: boolean, broadcast to the input's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.
            The others may hold anything.

    Returns:
        The loss: shape () or, for ``'none'``, the input's; the input's dtype (float32 for 16-bit ones under autocast).

    Raises:
        RuntimeError: input or target outside [0, 1] or nan, on the CPU. On CUDA tensors the loss is nan, and a later
            call raises, see :func:`fastloss.set_error_mode`; torch's assertion ends the process.
        ValueError: target of another size, an unknown reduction.
        RuntimeError, NotImplementedError, TypeError, AttributeError: as torch, for dtypes and other arguments.

    Example::

        >>> loss = fastloss.binary_cross_entropy(probabilities, labels)
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(binary_cross_entropy, (input, target, weight), input, target, **options)
    if recording():
        return record("binary_cross_entropy", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if weight is sample_weight is mask is None:
        result = _pointwise.usual(_NAME, input, target, reduction)
        if result is not None:
            return _pointwise.reported(result, input)
    code = _arguments.reduction_code(reduction)
    x = _checked(input, target, code, weight, sample_weight, mask)
    return _pointwise.reported(_pointwise.run_checked(x, _NAME), input)


def _checked(
    input: Tensor,
    target: Tensor,
    reduction: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> Operands:
    """The operands in one shape, after torch's exceptions in torch's order."""
    _pointwise.require(_NAME, "target", target)
    _pointwise.require(_NAME, "input", input)
    _arguments.refuse_strided_nested(_NAME, input, target)
    if target.shape != input.shape:
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}) is "
            "deprecated. Please ensure they have the same size."
        )
    others = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
    for name, t in others.items():
        if t is not None:
            _pointwise.require(_NAME, name, t)
    _arguments.require_supported_tensors(_NAME, input, target, *others.values())
    _arguments.require_same_device(_NAME, ("input", input), ("target", target), *others.items())
    if input.dtype not in DTYPE_CODES:
        raise NotImplementedError(
            f'{_NAME}(): "binary_cross_entropy" not implemented for input of dtype {input.dtype}: expected float32, '
            "float64, float16 or bfloat16"
        )
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise RuntimeError(
            f"{_NAME}(): torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. Give "
            "the scores to binary_cross_entropy_with_logits, or leave autocast for this call"
        )
    dtype = _arguments.autocast_dtype(input.dtype, input.device)
    if target.dtype not in DTYPE_CODES or _arguments.autocast_dtype(target.dtype, input.device) is not dtype:
        raise RuntimeError(
            f"Found dtype {_KINDS.get(target.dtype, target.dtype)} but expected {_KINDS[input.dtype]}. "
            f"{_NAME}(): target needs the input's dtype; call target.to(input.dtype)"
        )
    if input.dim() > _pointwise.MAX_DIMS:
        raise NotImplementedError(f"{_NAME}(): at most {_pointwise.MAX_DIMS} dimensions; flatten some of them")
    weight = _pointwise.broadcast_weight(_NAME, "weight", weight, input)
    weight, by_sample = _pointwise.weights(_NAME, weight, sample_weight, input.shape)
    if mask is not None:
        mask = _pointwise.expanded_mask(_NAME, mask, input.shape)
    return Operands(input, target, weight, mask, reduction, 0.0, dtype, sample_weight=by_sample)


class BCELoss(torch.nn.BCELoss):
    """:func:`binary_cross_entropy` as a module; a drop-in for :class:`torch.nn.BCELoss`.

    ``weight`` is a buffer, so state dicts are interchangeable with torch's; sample weights and mask are arguments of
    the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of probabilities against targets; shapes, dtypes and errors as :func:`binary_cross_entropy`."""
        return binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, sample_weight=sample_weight, mask=mask
        )
