"""CosFace: cross entropy of scaled cosines, a margin taken from that of the target, in the row kernel."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import record, recordable, recording
from . import _margins
from ._cross_entropy_module import CrossEntropyModule


@recordable
def cosface_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 0.35,
    scale: float = 64.0,
    weight: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    inplace_grad: bool = False,
    grad_in_forward: bool | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Any:
    r"""CosFace (Wang et al., 2018): cross entropy of scaled cosines, with a margin taken from the target's.

    The target's logit is ``scale * (cos t - margin)``, the other logits are ``scale * cos``.

    Args:
        input: cosines between features and the classes' directions, shape (C), (N, C) or (N, C, d1, ..., dK); float32,
            float64, float16 or bfloat16, any strides. They are not normalised here, and not clamped to [-1, 1].
        target: class indices, as :func:`cross_entropy`; probabilities have no class to move.
        margin: taken from the cosine of the target, not negative.
        scale: positive; the cosines are multiplied by it.
        weight: weight of each class, shape (C), any floating dtype.
        ignore_index: class index that marks targets to leave out, or several in a list (index targets only).
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``. ``'mean'`` divides by the sum of ``weight[target]``, as
            :func:`cross_entropy`; for the mean over all targets, as other packages have it, give ``normalizer``.
        label_smoothing, z_loss, sample_weight, normalizer, class_dim, all_ignored, zero_times_inf, inplace_grad,
            grad_in_forward, loss_dtype: as :func:`cross_entropy`, of the logits with the margin.

    Returns:
        The loss: shape () or, for ``'none'``, that of the target.

    Raises:
        ValueError: margin negative; scale not positive; probabilities.
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> cosines = F.normalize(features) @ F.normalize(prototypes).T
        >>> loss = fastloss.cosface_loss(cosines, labels, margin=0.35, scale=64.0)
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(cosface_loss, (input, target, weight, sample_weight), input, target, **options)
    if recording():
        return record("cosface_loss", arguments)
    margin = _arguments.as_float("cosface_loss", "margin", margin)
    if not 0 <= margin < math.inf:
        raise ValueError(f"cosface_loss(): margin must be finite and not negative, got {margin}")
    return _margins.run("cosface_loss", (0.0, float(margin)), arguments)


class CosFaceLoss(CrossEntropyModule):
    """:func:`cosface_loss` as a module. ``weight`` is a buffer; ``sample_weight`` is an argument of the call.

    Args:
        margin, scale, weight, ignore_index, reduction, label_smoothing: as :func:`cosface_loss`.
        options: what else :func:`cosface_loss` takes, by name.
    """

    function = staticmethod(cosface_loss)
    parameters_of_loss = ("margin", "scale")

    def __init__(
        self,
        margin: float = 0.35,
        scale: float = 64.0,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
        self.margin, self.scale = margin, scale
