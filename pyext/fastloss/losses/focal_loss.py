"""Softmax focal loss: cross entropy, each row's nll mapped to ``(1 - p)**gamma nll`` (``csrc/rowwise/row_maps.h``)."""

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
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
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
    r"""Softmax focal loss (Lin et al., 2017): cross entropy that counts what is already right for less.

    The loss of a row is ``w_t (1 - p_t)**gamma (-log p_t)``, p_t the softmax of its target. In general, with l the
    row's :func:`cross_entropy` (weights, smoothing, probabilities) and m the weight in it (``sum_c q_c``, which is w_t
    for a class index without smoothing), it is ``m (1 - exp(-l/m))**gamma l/m``: class weights stay out of p_t.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16, any strides.
        target: class indices or probabilities, as :func:`cross_entropy`.
        gamma: the focusing parameter, not negative; 0 is cross entropy.
        weight: weight of each class, shape (C) (the paper's alpha, one for each class), any floating dtype.
        ignore_index: class index that marks targets to leave out, or several in a list (index targets only).
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``. ``'mean'`` divides by the sum of ``weight[target]``, as
            :func:`cross_entropy`; for the mean over all targets, as other packages have it, give ``normalizer``.
        label_smoothing, z_loss, softcap, logit_scale, sample_weight, normalizer, class_dim, all_ignored,
            zero_times_inf, return_stats, inplace_grad, grad_in_forward, loss_dtype: as :func:`cross_entropy`; the
            z-loss is added unmapped.

    Returns:
        The loss: shape () or, for ``'none'``, that of an index target; with ``return_stats`` a pair (loss, stats).

    Raises:
        ValueError: gamma negative or infinite.
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> loss = fastloss.focal_loss(logits, labels, gamma=2.0, weight=torch.tensor([0.25, 0.75]))

    kornia's ``focal_loss`` and MONAI's ``FocalLoss(use_softmax=True)`` return the classes too, of which all but the
    target's are 0; their mean divides by those as well, kornia's also by ignored pixels. kornia's ``alpha`` a is a
    weight of ``[1 - a, a, ..., a]``. segmentation_models_pytorch's ``FocalLoss('multiclass')`` has no softmax: it is a
    :func:`fastloss.sigmoid_focal_loss` for each class.
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(focal_loss, (input, target, weight, sample_weight), input, target, **options)
    if recording():
        return record("focal_loss", arguments)
    return run("focal_loss", input, target, given(arguments), gamma)


class FocalLoss(CrossEntropyModule):
    """:func:`focal_loss` as a module. ``weight`` is a buffer; ``sample_weight`` is an argument of the call.

    Args:
        gamma, weight, ignore_index, reduction, label_smoothing: as :func:`focal_loss`.
        options: what else :func:`focal_loss` takes, by name.
    """

    function = staticmethod(focal_loss)
    parameters_of_loss = ("gamma",)

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
        self.gamma = gamma
