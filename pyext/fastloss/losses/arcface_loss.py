"""ArcFace: cross entropy of scaled cosines, an angle added to that of the target, in the row kernel."""

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
def arcface_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 0.5,
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
    r"""ArcFace (Deng et al., 2019): cross entropy of scaled cosines, with a margin added to the target's angle.

    With cos t the input at the target and m the margin, the target's logit is ``scale * cos(t + m)`` where
    cos t > cos(pi - m), and ``scale * (cos t - m sin(pi - m))`` elsewhere, where t + m would be beyond pi (as
    insightface with ``easy_margin=False``); the other logits are ``scale * cos``. Where one line takes over from the
    other the loss jumps a little, by definition. (Later versions of insightface move the target's angle outside of
    autograd, so that their gradient lacks the margin's derivative; here it is the derivative of the value.)
    pytorch-metric-learning's makes the cosines itself, and its margin is in degrees.

    The derivative by cos t is that of this formula: ``cos m + cos t sin m / sin t`` times scale. It is infinite at
    cos t = 1, so sin t counts as 0.001 there at least (angles below 0.06 degrees). Beyond 1, where rounding may bring
    a cosine, sin t is 0.

    Args:
        input: cosines between features and the classes' directions, shape (C), (N, C) or (N, C, d1, ..., dK); float32,
            float64, float16 or bfloat16, any strides. They are not normalised here, and not clamped to [-1, 1].
        target: class indices, as :func:`cross_entropy`; probabilities have no class to move.
        margin: m, in radians, from 0 to pi / 2.
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
        ValueError: margin outside [0, pi / 2]; scale not positive; probabilities.
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as :func:`cross_entropy`.

    Example::

        >>> cosines = F.normalize(features) @ F.normalize(prototypes).T
        >>> loss = fastloss.arcface_loss(cosines, labels, margin=0.5, scale=64.0)
    """
    arguments = locals()
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in arguments.items() if name not in ("input", "target")}
        return handle_torch_function(arcface_loss, (input, target, weight, sample_weight), input, target, **options)
    if recording():
        return record("arcface_loss", arguments)
    margin = _arguments.as_float("arcface_loss", "margin", margin)
    if not 0 <= margin <= math.pi / 2:
        raise ValueError(
            f"arcface_loss(): margin must be an angle in radians, from 0 to pi / 2, got {margin}; of degrees give "
            "math.radians(margin)"
        )
    return _margins.run("arcface_loss", (float(margin), 0.0), arguments)


class ArcFaceLoss(CrossEntropyModule):
    """:func:`arcface_loss` as a module. ``weight`` is a buffer; ``sample_weight`` is an argument of the call.

    Args:
        margin, scale, weight, ignore_index, reduction, label_smoothing: as :func:`arcface_loss`.
        options: what else :func:`arcface_loss` takes, by name.
    """

    function = staticmethod(arcface_loss)
    parameters_of_loss = ("margin", "scale")

    def __init__(
        self,
        margin: float = 0.5,
        scale: float = 64.0,
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, options)
        self.margin, self.scale = margin, scale
