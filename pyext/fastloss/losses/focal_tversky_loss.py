"""Focal Tversky loss: Tversky's loss of each class to a power. The mathematics is in ``csrc/rowwise/dice_loss.h``."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import record, recordable, recording
from ._dice_module import DiceModule
from .dice_loss import TVERSKY, Given, run


@recordable
def focal_tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
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
    r"""Focal Tversky loss of logits or probabilities for segmentation (Abraham and Khan, 2019).

    With TI_c the Tversky index of a sample and class (one minus :func:`fastloss.tversky_loss`), it is

    .. math::
        l_c = (1 - TI_c)^\gamma

    **The exponent is gamma**, as in the authors' code, not 1/gamma as in the paper's formula: the paper's 4/3 is
    ``gamma=0.75`` here. Below 1 classes that are nearly right count for more, above 1 for less.

    Where ``TI_c = 1`` exactly and gamma < 1 the slope is infinite: the gradient is 0 there, since the loss cannot get
    any smaller. Next to it, it is large; smooth_dr > smooth_nr keeps a distance. Where the index is above 1, which
    takes an input or target outside [0, 1] or smooth_nr > smooth_dr, loss and gradient are 0 unless gamma is 1.

    Args:
        input, target, weight: as :func:`fastloss.dice_loss`.
        alpha, beta: the price of a false positive and of a false negative, not negative. (In the paper alpha is that
            of a false negative.)
        gamma: the exponent, positive; 1 is :func:`fastloss.tversky_loss`.
        smooth, smooth_nr, smooth_dr: as :func:`fastloss.tversky_loss`.
        activation, ignore_index, batch, include_background, skip_absent, reduction: as :func:`fastloss.dice_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, (N, C), with ``batch`` (C); C - 1 without the background. In the input's
        dtype, promoted with that of a floating target (float32 for 16-bit input under autocast).

    Raises:
        ValueError: alpha or beta negative or infinite; gamma not positive or infinite.
        IndexError, ValueError, RuntimeError, NotImplementedError: as :func:`fastloss.dice_loss`.

    Example:
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [-2.0, 1.0, 1.5]]])  # one sample, two classes, three pixels
        >>> fastloss.focal_tversky_loss(logits, torch.tensor([[0, 1, 1]]))
        tensor(0.2180)

    segmentation_models_pytorch's TverskyLoss takes the mean over the classes to the power ``gamma``; here, as in the
    paper, each class's loss is. MONAI has none.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(focal_tversky_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("focal_tversky_loss", locals())
    name = "focal_tversky_loss"
    alpha = _arguments.as_non_negative(name, "alpha", alpha)
    beta = _arguments.as_non_negative(name, "beta", beta)
    gamma = _arguments.as_float(name, "gamma", gamma)
    if not 0 < gamma < float("inf"):
        raise ValueError(f"{name}(): gamma must be positive and finite, got {gamma}; 0.75 is the paper's 4/3")
    shared = Given(
        activation, ignore_index, batch, False, smooth, smooth_nr, smooth_dr, include_background, skip_absent, reduction
    )
    return run(name, input, target, weight, shared, TVERSKY, (alpha, beta, gamma))


class FocalTverskyLoss(DiceModule):
    """:func:`focal_tversky_loss` as a module. The weight is a buffer."""

    function = staticmethod(focal_tversky_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
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
