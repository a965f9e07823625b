"""Token-scaled cross entropy: each row's nll times its own probability, a constant (``csrc/rowwise/row_maps.h``)."""

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
def token_scaled_cross_entropy(
    input: Tensor,
    target: Tensor,
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
    r"""Token-scaled cross entropy (Wu et al., 2025): each target's loss times its probability, taken as a constant.

    The loss of a row is ``w_t stop_gradient(p_t) (-log p_t)``, p_t the softmax of its target: dynamic fine-tuning, or
    ``use_token_scaling`` of Liger's cross entropy. Its gradient is p_t times that of cross entropy, not the derivative
    of the value; second derivatives and forward mode take p_t as a constant, too. In general, with l the row's
    :func:`cross_entropy` (weights, smoothing, probabilities), it is ``stop_gradient(exp(-l/m)) l``,
    where m is the weight in l (``sum_c q_c``, which is w_t for a class index without smoothing): class weights stay out
    of p_t, as in :func:`focal_loss`.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16, any strides.
        target: class indices or probabilities, as :func:`cross_entropy`.
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
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> loss = fastloss.token_scaled_cross_entropy(logits.flatten(0, 1), tokens.flatten())
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(
            token_scaled_cross_entropy, (input, target, weight, sample_weight), input, target, **options
        )
    if recording():
        return record("token_scaled_cross_entropy", arguments)
    return run("token_scaled_cross_entropy", input, target, given(arguments))


class TokenScaledCrossEntropyLoss(CrossEntropyModule):
    """:func:`token_scaled_cross_entropy` as a module; ``weight`` is a buffer, ``sample_weight`` goes to the call.

    Args:
        weight, ignore_index, reduction, label_smoothing: as :func:`token_scaled_cross_entropy`.
        options: what else :func:`token_scaled_cross_entropy` takes, by name.
    """

    function = staticmethod(token_scaled_cross_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
