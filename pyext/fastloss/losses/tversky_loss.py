"""Tversky loss: dice with a price of its own for what is predicted in vain and for what is missed.

The mathematics is in ``csrc/rowwise/dice_loss.h``.
"""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import record, recordable, recording
from ._dice_module import DiceModule
from .dice_loss import TVERSKY, Given, run


@recordable
def tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    activation: str | None = "softmax",
    ignore_index: int = -100,
    batch: bool = False,
    smooth: float | None = None,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    skip_absent: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Tversky loss of logits or probabilities for segmentation (Salehi, Erdogmus and Gholipour, 2017).

    With p the activated input and t the target, as in :func:`fastloss.dice_loss`, of each sample and class c

    .. math::
        l_c = 1 - \frac{TP + \mathrm{smooth\_nr}}{TP + \alpha FP + \beta FN + \mathrm{smooth\_dr}}, \quad
        TP = \sum p t, \quad FP = \sum p (1 - t), \quad FN = \sum (1 - p) t

    with sums over the pixels that count. ``alpha = beta = 0.5`` is dice (with half its smoothing), 1 and 1 is the
    Jaccard index. Memory is read once in forward; read once and written once in backward.

    Args:
        input, target, weight: as :func:`fastloss.dice_loss`.
        alpha: the price of a false positive, not negative.
        beta: the price of a false negative, not negative. Small structures are found more often with ``beta > alpha``;
            the paper's best are 0.3 and 0.7.
        smooth, smooth_nr, smooth_dr: as :func:`fastloss.dice_loss`, beside TP instead of 2 TP.
        activation, ignore_index, batch, include_background, skip_absent, reduction: as :func:`fastloss.dice_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, (N, C), with ``batch`` (C); C - 1 without the background. In the input's
        dtype, promoted with that of a floating target (float32 for 16-bit input under autocast).

    Raises:
        ValueError: alpha or beta negative or infinite.
        IndexError, ValueError, RuntimeError, NotImplementedError: as :func:`fastloss.dice_loss`.

    Example:
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [-2.0, 1.0, 1.5]]])  # one sample, two classes, three pixels
        >>> fastloss.tversky_loss(logits, torch.tensor([[0, 1, 1]]), alpha=0.3, beta=0.7)
        tensor(0.1314)

    MONAI's TverskyLoss has the same alpha, beta and smoothing; its other options are named at
    :func:`fastloss.dice_loss`. Its floating targets are not probabilities unless ``soft_label``: the same where they
    are 0 and 1. segmentation_models_pytorch's has batch=True, skip_absent=True, ``smooth`` and the same alpha and beta.
    Its gamma is a power of the mean over the classes; that of :func:`fastloss.focal_tversky_loss` is one of each class.
    kornia's has the same alpha and beta, ``eps`` is smooth_dr beside smooth_nr=0; its mean leaves out classes of which
    a sample's target has nothing.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(tversky_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("tversky_loss", locals())
    name = "tversky_loss"
    alpha = _arguments.as_non_negative(name, "alpha", alpha)
    beta = _arguments.as_non_negative(name, "beta", beta)
    shared = Given(
        activation, ignore_index, batch, False, smooth, smooth_nr, smooth_dr, include_background, skip_absent, reduction
    )
    return run(name, input, target, weight, shared, TVERSKY, (alpha, beta, 1.0))


class TverskyLoss(DiceModule):
    """:func:`tversky_loss` as a module. The weight is a buffer."""

    function = staticmethod(tversky_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        activation: str | None = "softmax",
        ignore_index: int = -100,
        batch: bool = False,
        smooth: float | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        include_background: bool = True,
        skip_absent: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, locals())
