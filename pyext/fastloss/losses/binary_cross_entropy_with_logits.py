"""Binary cross entropy of logits. The mathematics is in ``csrc/pointwise/losses/classification.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._library import DTYPE_CODES
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise
from ._pointwise import Operands

_NAME = "binary_cross_entropy_with_logits"


@recordable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of logits; a drop-in for :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    The loss of an element is ``-w (p t log(sigmoid(x)) + (1 - t) log(1 - sigmoid(x)))``, p the ``pos_weight``. It is
    finite at logits of any size, and computed from x, t and nothing else of their size.

    Args:
        input: logits x, any shape; float32, float64, float16 or bfloat16, any strides.
        target: probabilities t between 0 and 1 in the input's shape, floating. Differentiable.
        weight: weight of each element, any shape that broadcasts to the input's (per class, per row, a number), without
            a copy. Differentiable (torch refuses that).
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the number of elements that count, whatever their weights, as
            torch does) | ``'sum'``.
        pos_weight: weight of what is positive, any shape that broadcasts to the input's, without a copy. Differentiable
            (torch refuses that).
        label_smoothing: e in [0, 1]: targets become ``t (1 - e) + e / 2``.
        ignore_index: value of the target that marks elements to leave out, by a mask of a byte for each element; None:
            all count.
        sample_weight: weight of each sample, shape (N) for input (N, ...), no gradient; multiplies ``weight``.
        mask: boolean, broadcast to the input's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the input's; the target's dtype, as torch (float32 for 16-bit ones under
        autocast).

    Raises:
        ValueError: target of another size, an unknown reduction.
        RuntimeError: label_smoothing outside [0, 1]; weights that do not broadcast; integer targets.
        NotImplementedError: integer or complex logits.

    Example, ten labels of which each is rare in its own way::

        >>> loss = fastloss.binary_cross_entropy_with_logits(logits, labels, pos_weight=negatives / positives)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target, **options
        )
    if recording():
        return record("binary_cross_entropy_with_logits", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    usual = weight is pos_weight is sample_weight is mask is None and ignore_index is None
    if usual and type(label_smoothing) is float and label_smoothing == 0.0:
        result = _pointwise.usual(_NAME, input, target, reduction)
        if result is not None:
            return result
    code = _arguments.reduction_code(reduction)
    x = _checked(input, target, code, weight, pos_weight, sample_weight, mask)
    if ignore_index is not None:
        counts = target != _arguments.as_float(_NAME, "ignore_index", ignore_index)
        x = x._replace(mask=counts if x.mask is None else counts & x.mask)
    smoothing = _arguments.as_float(_NAME, "label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise RuntimeError(f"{_NAME}(): label_smoothing must be between 0.0 and 1.0. Got: {smoothing}")
    return _pointwise.run_checked(x, _NAME, (float(smoothing),))


def _checked(
    input: Tensor,
    target: Tensor,
    reduction: int,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> Operands:
    """The operands in one shape, after torch's exceptions in torch's order."""
    _pointwise.require(_NAME, "target", target)
    _pointwise.require(_NAME, "input", input)
    _arguments.refuse_strided_nested(_NAME, input, target)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    others = {"weight": weight, "pos_weight": pos_weight, "sample_weight": sample_weight, "mask": mask}
    for name, t in others.items():
        if t is not None:
            _arguments.require_tensor(name, t, _NAME)
    _arguments.require_supported_tensors(_NAME, input, target, *others.values())
    _arguments.require_same_device(_NAME, ("input", input), ("target", target), *others.items())
    if input.dtype not in DTYPE_CODES:
        raise NotImplementedError(
            f'{_NAME}(): "log_sigmoid" not implemented for input of dtype {input.dtype}: expected float32, float64, '
            "float16 or bfloat16"
        )
    if target.dtype not in DTYPE_CODES:
        raise RuntimeError(
            f"{_NAME}(): result type {input.dtype} can't be cast to the target's {target.dtype}; call "
            "target.to(input.dtype)"
        )
    if input.dim() > _pointwise.MAX_DIMS:
        raise NotImplementedError(f"{_NAME}(): at most {_pointwise.MAX_DIMS} dimensions; flatten some of them")
    dtype = _arguments.autocast_dtype(target.dtype, input.device)
    weight, pos_weight = (
        _pointwise.broadcast_weight(_NAME, name, others[name], input) for name in ("weight", "pos_weight")
    )
    weight, by_sample = _pointwise.weights(_NAME, weight, sample_weight, input.shape)
    if mask is not None:
        mask = _pointwise.expanded_mask(_NAME, mask, input.shape)
    further = () if pos_weight is None else (pos_weight,)
    return Operands(input, target, weight, mask, reduction, 0.0, dtype, further, by_sample)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:func:`binary_cross_entropy_with_logits` as a module; a drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    Takes torch's constructor arguments and, keyword-only, ``label_smoothing`` and ``ignore_index``. ``weight`` and
    ``pos_weight`` are buffers, so state dicts are interchangeable with torch's.
    """

    # Of modules that were torch's before they became one of this class.
    label_smoothing: float = 0.0
    ignore_index: float | None = None

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits against targets; as :func:`binary_cross_entropy_with_logits`."""
        return binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            mask=mask,
        )
