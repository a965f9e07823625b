"""Dice loss: the overlap of predicted and true areas, class by class, without one-hot targets or stored probabilities.

And the rules of its family: Tversky's losses, dice with cross entropy. The mathematics is in
``csrc/rowwise/dice_loss.h``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, errors, formulas
from .._autograd import Engine, Grads, Needs, Path, Rules, Tensors, accum_dtype
from .._library import DTYPE_CODES, DTYPES, NONE, loop_vmap, ops
from .._recorded import record, recordable, recording
from . import _rowwise
from ._dice_module import DiceModule

_ACTIVATIONS = {None: 0, "softmax": 1, "sigmoid": 2}  # codes of the C++ enum Activation

# Which of the family: what it makes of the sums. TVERSKY has the parameters alpha, beta, gamma; DICE_CE lambda_dice,
# lambda_ce, label_smoothing.
DICE, TVERSKY, DICE_CE = range(3)


class Given(NamedTuple):
    """The options that the family shares, as they are given."""

    activation: str | None
    ignore_index: int
    batch: bool
    squared: bool
    smooth: float | None
    smooth_nr: float
    smooth_dr: float
    include_background: bool
    skip_absent: bool
    reduction: str


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    loss: int
    params: Sequence[float]
    activation: int
    batch: bool
    squared: bool
    include_background: bool
    skip_absent: bool
    smooth_nr: float
    smooth_dr: float
    ignore_index: int
    reduction: int
    loss_dtype: int


class _DiceLoss(Rules):
    """Operands: input, target, weight. The first two may have gradients, the target where it is floating."""

    name, tensors, wants, options = "dice_loss", 3, 2, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        return (ops.dice_loss_value(*tensors, *o),)

    def forward(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        return ops.dice_loss_forward(*tensors, *o)  # type: ignore[no-any-return]

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        arguments = (grad_output.contiguous(), *tensors, saved, *o)
        return (
            ops.dice_loss_backward(*arguments) if needs[0] else None,
            ops.dice_loss_target_backward(*arguments) if needs[1] else None,
        )

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        return formulas.dice_loss(tensors, o)

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        return False  # no gradient is known before the sums over all pixels are

    def regime(self, tensors: Tensors, o: Options, path: Path) -> str:
        return str(ops.dice_loss_regime(*tensors[:2]))

    def operators(
        self, path: Path, tensors: Tensors, o: Options, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if path is Path.VALUE:
            return super().operators(path, tensors, o, needs)
        backward = ("dice_loss_backward", "dice_loss_target_backward")
        return ("dice_loss_forward",), tuple(name for name, needed in zip(backward, needs, strict=True) if needed)


def _fake_loss(input: Any, target: Any, weight: Any, *options: Any) -> Any:
    o = Options(*options)
    classes = max(input.shape[1] - (not o.include_background), 0)
    shape = ([] if o.batch else [input.shape[0]]) + [classes] if o.reduction == NONE else []
    return input.new_empty(shape, dtype=DTYPES[o.loss_dtype])


@torch.library.register_fake("fastloss::dice_loss_forward")
def _(input: Any, *rest: Any) -> Any:
    groups = 1 if Options(*rest[2:]).batch else input.shape[0]
    return _fake_loss(input, *rest), input.new_empty([3 * groups * input.shape[1] + 2], dtype=torch.float64)


torch.library.register_fake("fastloss::dice_loss_value")(_fake_loss)
torch.library.register_fake("fastloss::dice_loss_backward")(lambda _, input, *rest: torch.empty_like(input))
torch.library.register_fake("fastloss::dice_loss_target_backward")(lambda _, x, target, *rest: torch.empty_like(target))
for _name in ("value", "forward", "backward", "target_backward"):
    torch.library.register_vmap(f"fastloss::dice_loss_{_name}", loop_vmap(getattr(ops, f"dice_loss_{_name}")))

_engine = Engine(_DiceLoss())


@recordable
def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str | None = "softmax",
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
    r"""Dice loss of logits or probabilities for segmentation (Milletari et al., V-Net, 2016).

    With p the activated input and t the target, 1 for a pixel's class and 0 for the others, of each sample and class c

    .. math::
        l_c = 1 - \frac{2 \sum p t + \mathrm{smooth\_nr}}{\sum p + \sum t + \mathrm{smooth\_dr}}

    with sums over the pixels that count. Memory is read once in forward; read once and written once in backward; no
    one-hot tensor and no probabilities are ever made.

    Args:
        input: logits or probabilities, shape (N, C, d1, ..., dK) with K >= 0; float32, float64, float16 or bfloat16,
            any strides.
        target: class indices, shape (N, d1, ..., dK) or (N, 1, d1, ..., dK), any integer dtype; or a floating tensor
            of the input's shape, for several labels per pixel or soft ones. A mask of a single class (C = 1) is such a
            tensor: ``mask.to(input.dtype)``.
        weight: weight of each class, shape (C), multiplies the class's loss; any floating dtype.
        activation: ``'softmax'`` over the classes | ``'sigmoid'`` | None: the input holds probabilities.
        ignore_index: class index that marks pixels to leave out of all sums; such pixels have gradient 0.
        batch: sums over the whole batch instead of each sample.
        squared: :math:`\sum p^2 + \sum t^2` in the denominator, as V-Net has it.
        smooth: both smooth_nr and smooth_dr; None: what these say.
        smooth_nr, smooth_dr: not negative; where a class is neither predicted nor there, the loss is
            ``1 - smooth_nr / smooth_dr``.
        include_background: False leaves class 0 out of the result (it remains part of the softmax).
        skip_absent: True: classes of which the target has nothing, in the sample or with ``batch`` in the batch, have
            loss 0 (they still count in the mean).
        reduction: ``'none'`` | ``'mean'`` over samples and classes, divided by their number | ``'sum'``. A sample whose
            pixels are all ignored has loss 0 and is left out of the mean.

    Returns:
        The loss: shape () or, for ``'none'``, (N, C), with ``batch`` (C); C - 1 without the background. In the input's
        dtype, promoted with that of a floating target (float32 for 16-bit input under autocast).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; on CUDA by a later call, see
            :func:`fastloss.set_error_mode`.
        ValueError: an unknown activation or reduction; smooth_nr or smooth_dr negative or infinite; an input of less
            than two dimensions; a floating target that has not the input's shape; batches of different size.
        RuntimeError: a target of another shape or dtype, a weight that has not C elements or requires grad, tensors on
            different devices, a floating target with ignore_index >= 0.
        NotImplementedError: an input that is not floating; devices without kernels.

    Example:
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [-2.0, 1.0, 1.5]]])  # one sample, two classes, three pixels
        >>> fastloss.dice_loss(logits, torch.tensor([[0, 1, 1]]))
        tensor(0.1416)

    The same as other libraries' DiceLoss:

    - MONAI: ``softmax=True`` is activation='softmax', ``sigmoid=True`` is 'sigmoid', neither is None;
      ``to_onehot_y=True`` is a target of class indices (here one that needs no conversion); ``squared_pred`` is
      squared; ``batch``, ``smooth_nr``, ``smooth_dr``, ``include_background``, ``ignore_index`` and ``reduction`` have
      the same names. ``weight`` too, but without the background it still has C elements here; the first is not used.
      Not copied: MONAI counts a sample whose pixels are all ignored in its mean, as if it were right; for K = 0 it
      sums over samples and classes; for C = 1 it leaves out activation, weight or include_background with a warning;
      its ``'none'`` appends dimensions of size 1. Not here: ``jaccard``, ``soft_label``, ``other_act``.
    - segmentation_models_pytorch: batch=True and skip_absent=True; ``smooth`` s is smooth_nr=2*s and smooth_dr=2*s (its
      ``eps`` bounds the denominator; smooth_dr, which is added to it, serves as well); mode ``'multiclass'`` is
      activation='softmax', ``'multilabel'`` and ``'binary'`` are 'sigmoid' with a floating target;
      ``from_logits=False`` is None; ``class_weights`` w are ``weight=w * C / w.sum()``, since its mean divides by the
      sum of the weights; ``classes`` are weights of 0 for the others and ``C / len(classes)`` for these. Not copied:
      its overlap is ``sum(min(p, t))``, the same where targets are 0 and 1 only. Not here: ``log_loss``.
    - kornia: ``average='macro'`` is what is here, ``eps`` is smooth_dr beside smooth_nr=0; ``weight`` w is
      ``w * C / w.sum()``. Not copied: its mean leaves out classes of which a sample's target has nothing, so that they
      may be predicted for free; a sample whose pixels are all ignored counts as wrong. Not here: ``average='micro'``.
    """
    if has_torch_function_variadic(input, target, weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(dice_loss, (input, target, weight), input, target, **options)
    if recording():
        return record("dice_loss", locals())
    shared = Given(
        activation,
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
    return run("dice_loss", input, target, weight, shared)


def run(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    given: Given,
    loss: int = DICE,
    params: Sequence[float] = (),
) -> Tensor:
    """A loss of the family, from its arguments as they are given; ``name`` is its function's."""
    red = _arguments.reduction_code(given.reduction)
    if not isinstance(given.activation, (str, type(None))) or given.activation not in _ACTIVATIONS:
        raise ValueError(f"{name}(): activation must be 'softmax', 'sigmoid' or None, got {given.activation!r}")
    _arguments.require_tensor("input", input, name)
    _arguments.require_tensor("target", target, name)
    if weight is not None:
        _arguments.require_tensor("weight", weight, name)
    ignore_index = _arguments.as_int(name, "ignore_index", given.ignore_index)
    smooth_nr, smooth_dr = given.smooth_nr, given.smooth_dr
    if given.smooth is not None:
        smooth_nr = smooth_dr = _arguments.as_non_negative(name, "smooth", given.smooth)
    smooth_nr = _arguments.as_non_negative(name, "smooth_nr", smooth_nr)
    smooth_dr = _arguments.as_non_negative(name, "smooth_dr", smooth_dr)
    _arguments.require_supported_tensors(name, input, target, weight)
    _arguments.require_same_device(name, ("input", input), ("target", target), ("weight", weight))
    _rowwise.check_logits_dtype(input, name)
    if input.dim() < 2:
        raise ValueError(
            f"{name}(): input must have shape (N, C, d1, ...), got {list(input.shape)}; a single sample needs "
            "input.unsqueeze(0)"
        )
    dtype = input.dtype
    if target.is_floating_point():
        target = _floating_target(name, input, target, ignore_index)
        dtype = torch.promote_types(dtype, target.dtype)
        if dtype is torch.float64:
            input = input.double()
    else:
        target = _index_target(name, input, target)
    if weight is not None:
        _rowwise.check_weight(weight, input.shape[1], name)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}(): not differentiable with respect to argument 'weight'. This input cannot have requires_grad "
                "True; pass weight.detach(), or multiply the result of reduction='none'"
            )
        weight = weight.to(accum_dtype(input.dtype)).contiguous()
    options = Options(
        loss,
        tuple(float(p) for p in params),
        _ACTIVATIONS[given.activation],
        bool(given.batch),
        bool(given.squared),
        bool(given.include_background),
        bool(given.skip_absent),
        smooth_nr,
        smooth_dr,
        ignore_index,
        red,
        DTYPE_CODES[_arguments.autocast_dtype(dtype, input.device)],
    )
    (result,) = _engine((input, target, weight), options)
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    return result


def _floating_target(name: str, input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    if target.dtype not in DTYPE_CODES:
        raise RuntimeError(f"{name}(): target of dtype {target.dtype} is not supported; call target.to(input.dtype)")
    if target.shape != input.shape:
        raise ValueError(
            f"{name}(): a floating target needs the input's shape {list(input.shape)}, got {list(target.shape)}; "
            "class indices need an integer dtype: target.long()"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"{name}(): ignore_index is not supported for floating point target; set input and target to 0 there, "
            "with activation=None"
        )
    return target


def _index_target(name: str, input: Tensor, target: Tensor) -> Tensor:
    classes = input.shape[1]
    if target.dtype is torch.bool or (classes == 1 and target.shape == input.shape):
        raise RuntimeError(
            f"{name}(): a mask of dtype {target.dtype} as target: call target.to(input.dtype) for one label per "
            "class and pixel, of the input's shape; integers are class indices, one per pixel"
        )
    _rowwise.check_index_dtype(target, name)
    if target.dim() == input.dim() and target.shape[1] == 1:
        target = target.squeeze(1)
    _rowwise.check_index_shapes(input, target, name)
    return _rowwise.index_target(target)


class DiceLoss(DiceModule):
    """:func:`dice_loss` as a module. The weight is a buffer."""

    function = staticmethod(dice_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        activation: str | None = "softmax",
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
