"""Dice loss and cross entropy of the same logits, in one pass. The mathematics is in ``csrc/rowwise/dice_loss.h``."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import record, recordable, recording
from ._dice_module import DiceModule
from .cross_entropy import cross_entropy
from .dice_loss import DICE, DICE_CE, Given, run


@recordable
def dice_ce_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    batch: bool = False,
    squared: bool = False,
    smooth: float | None = None,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    skip_absent: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Dice loss and cross entropy of logits for segmentation, added (MONAI's DiceCELoss).

    ``lambda_dice * dice_loss(input, target) + lambda_ce * cross_entropy(input, target)``, with a softmax over the
    classes in both. The logits are read once in forward for both, and read once and written once in backward.

    Args:
        input: logits, shape (N, C, d1, ..., dK) with K >= 0; float32, float64, float16 or bfloat16, any strides.
        target: class indices, shape (N, d1, ..., dK) or (N, 1, d1, ..., dK), any integer dtype. Or probabilities of the
            input's shape, for which each of the two losses reads the logits.
        weight: weight of each class, shape (C), of both losses; any floating dtype.
        lambda_dice, lambda_ce: factors of the two, not negative.
        label_smoothing: of the cross entropy, as torch's.
        ignore_index: class index that marks pixels to leave out of both; such pixels have gradient 0.
        batch, squared, smooth, smooth_nr, smooth_dr, include_background, skip_absent: of the dice loss, as
            :func:`fastloss.dice_loss`. The cross entropy always has the background.
        reduction: of both, ``'mean'`` | ``'sum'``. The mean of the cross entropy is divided by the sum of
            ``weight[target]``, as torch's; where all pixels are ignored it is nan, as torch's.

    Returns:
        The loss, shape (), in the input's dtype, promoted with that of a floating target (float32 for 16-bit input
        under autocast).

    Raises:
        ValueError: ``reduction='none'``, since the two losses have different shapes; lambda_dice or lambda_ce negative
            or infinite.
        RuntimeError: label_smoothing outside [0, 1].
        IndexError, ValueError, RuntimeError, NotImplementedError: as :func:`fastloss.dice_loss`.

    Example:
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [-2.0, 1.0, 1.5]]])  # one sample, two classes, three pixels
        >>> fastloss.dice_ce_loss(logits, torch.tensor([[0, 1, 1]]))
        tensor(0.2944)

    MONAI's DiceCELoss: ``softmax=True`` (what its cross entropy has in any case) is all that is here; class indices
    need no ``to_onehot_y``; ``squared_pred`` is squared; ``include_background``, ``smooth_nr``, ``smooth_dr``,
    ``batch``, ``weight`` (always C elements), ``lambda_dice``, ``lambda_ce``, ``label_smoothing`` and ``reduction``
    have the same names. It has no ``ignore_index``. Not here: ``jaccard``, ``other_act``, and ``sigmoid``, for which,
    as for a mask of a single class, add :func:`fastloss.dice_loss` with activation='sigmoid' and
    :func:`fastloss.binary_cross_entropy_with_logits`.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(dice_ce_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("dice_ce_loss", locals())
    name = "dice_ce_loss"
    factors = []
    for argument, value in (("lambda_dice", lambda_dice), ("lambda_ce", lambda_ce)):
        factors.append(_arguments.as_non_negative(name, argument, value))
    label_smoothing = _arguments.as_float(name, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if reduction == "none":
        raise ValueError(
            f"{name}(): reduction must be 'mean' or 'sum', got 'none': dice has a loss for each class, cross entropy "
            "one for each pixel; call dice_loss and cross_entropy with reduction='none'"
        )
    shared = Given(
        "softmax",
        ignore_index,
        batch,
        squared,
        smooth,
        smooth_nr,
        smooth_dr,
        include_background,
        skip_absent,
        reduction,
    )
    if not (isinstance(target, Tensor) and target.is_floating_point()):
        return run(name, input, target, weight, shared, DICE_CE, (*factors, label_smoothing))
    dice = run(name, input, target, weight, shared, DICE)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    return factors[0] * dice + factors[1] * cross_entropy(input, target, weight, **options)


class DiceCELoss(DiceModule):
    """:func:`dice_ce_loss` as a module. The weight is a buffer."""

    function = staticmethod(dice_ce_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        batch: bool = False,
        squared: bool = False,
        smooth: float | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        include_background: bool = True,
        skip_absent: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, locals())
