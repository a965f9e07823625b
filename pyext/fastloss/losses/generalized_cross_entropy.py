"""Generalized cross entropy: each row's nll mapped to ``(1 - p**q) / q`` (``csrc/rowwise/row_maps.h``)."""

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
def generalized_cross_entropy(
    input: Tensor,
    target: Tensor,
    q: float = 0.7,
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
    r"""Generalized cross entropy (Zhang & Sabuncu, 2018): bounded, so that wrong labels weigh less.

    The loss of a row is ``w_t (1 - p_t**q) / q``, p_t the softmax of its target: between cross entropy (q towards 0)
    and the mean absolute error of the probability (q = 1). In general, with l the row's :func:`cross_entropy` (weights,
    smoothing, probabilities), it is ``m (1 - exp(-q l/m)) / q``,
    where m is the weight in l (``sum_c q_c``, which is w_t for a class index without smoothing): class weights stay out
    of p_t, as in :func:`focal_loss`.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16, any strides.
        target: class indices or probabilities, as :func:`cross_entropy`.
        q: above 0, up to 1.
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
        ValueError: q outside (0, 1].
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> loss = fastloss.generalized_cross_entropy(logits, noisy_labels, q=0.7)
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(
            generalized_cross_entropy, (input, target, weight, sample_weight), input, target, **options
        )
    if recording():
        return record("generalized_cross_entropy", arguments)
    return run("generalized_cross_entropy", input, target, given(arguments), q)


class GeneralizedCrossEntropyLoss(CrossEntropyModule):
    """:func:`generalized_cross_entropy` as a module. ``weight`` is a buffer, ``sample_weight`` an argument of the call.

    Args:
        q, weight, ignore_index, reduction, label_smoothing: as :func:`generalized_cross_entropy`.
        options: what else :func:`generalized_cross_entropy` takes, by name.
    """

    function = staticmethod(generalized_cross_entropy)
    parameters_of_loss = ("q",)

    def __init__(
        self,
        q: float = 0.7,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
        self.q = q
