"""Poly-1 loss: cross entropy, each row's nll mapped to ``nll + epsilon (1 - p)`` (``csrc/rowwise/row_maps.h``)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._nested import handle_torch_function
from .._recorded import record, recordable, recording
from ._cross_entropy_module import CrossEntropyModule
from ._row_map import run
from .cross_entropy import given


@recordable
def poly1_loss(
    input: Tensor,
    target: Tensor,
    epsilon: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    inplace_grad: bool = False,
    grad_in_forward: bool | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Any:
    r"""Poly-1 loss (Leng et al., 2022): cross entropy plus ``epsilon`` times what the target lacks of probability 1.

    The loss of a row is ``w_t (-log p_t + epsilon (1 - p_t))``, p_t the softmax of its target. In general, with l the
    row's :func:`cross_entropy` (weights, smoothing, probabilities), it is ``m (l/m + epsilon (1 - exp(-l/m)))``,
    where m is the weight in l (``sum_c q_c``, which is w_t for a class index without smoothing): class weights stay out
    of p_t, as in :func:`focal_loss`.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16, any strides.
        target: class indices or probabilities, as :func:`cross_entropy`.
        epsilon: the coefficient of ``1 - p_t``, -1 or more; 0 is cross entropy.
        weight: weight of each class, shape (C), any floating dtype.
        ignore_index: class index that marks targets to leave out, or several in a list (index targets only).
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``. ``'mean'`` divides by the sum of ``weight[target]``, as
            :func:`cross_entropy`; for the mean over all targets, as other packages have it, give ``normalizer``.
        label_smoothing, z_loss, softcap, logit_scale, sample_weight, normalizer, class_dim, all_ignored,
            zero_times_inf, return_stats, inplace_grad, grad_in_forward, loss_dtype: as :func:`cross_entropy`; the
            z-loss is added unmapped.

    Returns:
        The loss: shape () or, for ``'none'``, that of an index target; with ``return_stats`` a pair (loss, stats).

    Raises:
        ValueError: epsilon below -1, where the loss would grow with p_t.
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> loss = fastloss.poly1_loss(logits, labels, epsilon=2.0)
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(poly1_loss, (input, target, weight, sample_weight), input, target, **options)
    if recording():
        return record("poly1_loss", arguments)
    return run("poly1_loss", input, target, given(arguments), epsilon)


class Poly1Loss(CrossEntropyModule):
    """:func:`poly1_loss` as a module. ``weight`` is a buffer; ``sample_weight`` is an argument of the call.

    Args:
        epsilon, weight, ignore_index, reduction, label_smoothing: as :func:`poly1_loss`.
        options: what else :func:`poly1_loss` takes, by name.
    """

    function = staticmethod(poly1_loss)
    parameters_of_loss = ("epsilon",)

    def __init__(
        self,
        epsilon: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
        self.epsilon = epsilon
