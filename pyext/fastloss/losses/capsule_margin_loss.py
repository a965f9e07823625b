"""Margin loss of capsule networks. The mathematics is in ``csrc/rowwise/row_losses.h`` for class indices and in
``csrc/pointwise/losses/multilabel.h`` for several classes at once."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._autograd import accum_dtype
from .._library import MEAN, NONE
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise, _row_loss

_NAME = "capsule_margin_loss"


@recordable
def capsule_margin_loss(
    input: Tensor,
    target: Tensor,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    down_weight: float = 0.5,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Margin loss of capsule networks (Sabour et al., 2017).

    The loss of a sample is ``sum over c of t_c max(0, m_plus - v_c)**2 + down_weight (1 - t_c) max(0, v_c -
    m_minus)**2``, v_c the length of the capsule of class c and t_c whether that class is there. Class indices are not
    expanded to one-hot vectors.

    Args:
        input: lengths of the capsules, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype; or, where several classes may be
            there, t of the input's shape, boolean, integer or floating.
        m_plus, m_minus: lengths above which a class that is there, and below which one that is not, costs nothing.
        down_weight: weight of the classes that are not there, lambda in the paper; 0 or more.
        reduction: of the samples: ``'none'`` | ``'mean'`` (divided by how many count) | ``'sum'``.
        weight: weight of the samples of each class, shape (C), any floating dtype; with t, of its part in each sample.
        ignore_index: class index of samples that do not count.

    Returns:
        The loss: shape () or, for ``'none'``, that of class indices; in the input's dtype (float32 for 16-bit input
        under autocast).

    Raises:
        IndexError: a class index outside [0, C); on CUDA by a later call, see :func:`fastloss.set_error_mode`.
        ValueError: a margin that is not finite; down_weight negative or infinite; shapes that do not go together.
        RuntimeError, TypeError, NotImplementedError: as :func:`fastloss.nll_loss`.

    Example::

        >>> loss = fastloss.capsule_margin_loss(capsules.norm(dim=-1), digits)
    """
    if has_torch_function_variadic(input, target, weight):
        options: dict[str, Any] = {
            "m_plus": m_plus,
            "m_minus": m_minus,
            "down_weight": down_weight,
            "reduction": reduction,
        }
        options |= {"weight": weight, "ignore_index": ignore_index}
        return handle_torch_function(capsule_margin_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("capsule_margin_loss", locals())
    _arguments.require_tensor("input", input, _NAME)
    _arguments.require_tensor("target", target, _NAME)
    params = (
        _margin("m_plus", m_plus),
        _margin("m_minus", m_minus),
        float(_arguments.as_non_negative(_NAME, "down_weight", down_weight)),
    )
    if input.dim() and target.shape == input.shape:
        return _of_several(input, target, params, reduction, weight)
    if target.is_floating_point() or target.dtype is torch.bool:
        raise ValueError(
            f"{_NAME}(): a target of {target.dtype} says of each class whether it is there and needs the input's shape "
            f"{list(input.shape)}, got {list(target.shape)}; for class indices call target.long()"
        )
    return _row_loss.run(
        _NAME,
        input,
        target,
        weight,
        reduction,
        ignore_index=ignore_index,
        params=params,
        flags=_row_loss.MEAN_OVER_ROWS,
    )


def _margin(name: str, value: Any) -> float:
    value = float(_arguments.as_float(_NAME, name, value))
    if not abs(value) < float("inf"):
        raise ValueError(f"{_NAME}(): {name} must be finite, got {value}; lengths are from 0 to 1")
    return value


def _of_several(
    input: Tensor, target: Tensor, params: tuple[float, float, float], reduction: str, weight: Tensor | None
) -> Tensor:
    """Of t in the input's shape."""
    dim = min(input.dim() - 1, 1)
    classes = input.shape[dim]
    if weight is not None:
        _arguments.require_tensor("weight", weight, _NAME)
        if weight.shape != (classes,):
            raise ValueError(
                f"{_NAME}(): weight needs an element for each of {classes} classes, got {list(weight.shape)}"
            )
        weight = weight.view(-1, *[1] * (input.dim() - dim - 1))
    code = _arguments.reduction_code(reduction)
    if code == MEAN:  # over the samples, of sums over the classes
        one = torch.ones((), dtype=accum_dtype(input.dtype), device=input.device) if weight is None else weight
        weight = one.to(accum_dtype(input.dtype)) * classes
    x = _pointwise.checked(_NAME, input, target.to(input.dtype), reduction, weight, None, None, mean_counts=True)
    if code == NONE:
        return _pointwise.loss_of_groups(_NAME, x, [dim], params)
    return _pointwise.run_checked(x, _NAME, params)


class CapsuleMarginLoss(torch.nn.Module):
    """:func:`capsule_margin_loss` as a module. Class weights are a buffer."""

    __prepare_scriptable__ = not_scriptable

    weight: Tensor | None

    def __init__(
        self,
        m_plus: float = 0.9,
        m_minus: float = 0.1,
        down_weight: float = 0.5,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.m_plus, self.m_minus, self.down_weight, self.reduction = m_plus, m_minus, down_weight, reduction
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of lengths (N, C, ...) against targets; shapes, dtypes and errors as :func:`capsule_margin_loss`."""
        options: dict[str, Any] = {"weight": self.weight, "ignore_index": self.ignore_index}
        margins = (self.m_plus, self.m_minus, self.down_weight)
        return capsule_margin_loss(input, target, *margins, self.reduction, **options)
