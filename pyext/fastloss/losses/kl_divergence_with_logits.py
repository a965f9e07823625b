"""Kullback-Leibler divergence of two softmaxes, from their logits; see ``csrc/rowwise/divergence.h``."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._recorded import not_scriptable, record, recordable, recording
from . import _divergence


@recordable
def kl_divergence_with_logits(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    temperature_squared: bool = False,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of two softmaxes, as for distillation (Hinton et al., 2015): student and teacher.

    With s = softmax(input / temperature) and t = softmax(target / temperature), a row's divergence is

    - ``'forward'``: KL(t || s) = ``sum_c t_c log(t_c / s_c)``,
    - ``'reverse'``: KL(s || t) = ``sum_c s_c log(s_c / t_c)`` (Gu et al., MiniLLM, 2024).

    Both logits are read once, and each gradient that is wanted is written once; no softmax is ever in memory. A class
    that has no probability under the first of the two adds nothing, so both may mask classes with -inf; one that has
    some there and none under the second makes the divergence infinite. Logits that agree have divergence 0, and those
    that nearly agree one with all its digits.

    Args:
        input: the student's logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16,
            any strides.
        target: the teacher's logits, the same shape; any of these dtypes. Differentiable as well; detached where
            only the student learns.
        reduction: ``'none'`` | ``'mean'`` over the rows that count, by their weights | ``'sum'`` | ``'batchmean'``: the
            sum divided by the size of the first dimension, as :func:`torch.nn.functional.kl_div` has it (rows that do
            not count included).
        direction: ``'forward'`` or ``'reverse'``, see above.
        temperature: divides the logits of both; positive.
        temperature_squared: multiply the loss by ``temperature**2``, so that its gradient does not fade as the
            temperature grows.
        class_dim: dimension of the classes, if not 1 (0 for shape (C)); -1 for logits (batch, tokens, vocabulary).
        mask: boolean, one element per row, the input's shape without its classes; True marks the rows that count.
        sample_weight: weight of each row, the same shape, any floating dtype. A row of weight 0 does not count.

    Returns:
        The loss: shape () or, for ``'none'``, the input's without its classes; dtype promoted over input and target
        (float32 for 16 bits under autocast). A mean over no rows is nan, with gradient 0.

    Raises:
        ValueError: an unknown reduction or direction; a temperature that is not positive and finite; shapes that differ
            from each other or from a row's.
        IndexError: class_dim that the input has not.
        RuntimeError: tensors on different devices; a mask that is not boolean; sample_weight that requires grad.
        TypeError, NotImplementedError: arguments, dtypes and devices that are not supported.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0]])
        >>> fastloss.kl_divergence_with_logits(student, teacher)
        tensor(0.4205)

    With the defaults the same as ``F.kl_div(input.log_softmax(1), target.log_softmax(1), reduction="batchmean",
    log_target=True)`` for input (N, C). Not copied: torch's is nan where both logits are -inf.
    """
    if has_torch_function_variadic(input, target, mask, sample_weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        operands = (input, target, mask, sample_weight)
        return handle_torch_function(kl_divergence_with_logits, operands, input, target, **options)
    if recording():
        return record("kl_divergence_with_logits", locals())
    if direction not in ("forward", "reverse"):
        raise ValueError(
            f"kl_divergence_with_logits(): direction must be 'forward', KL(target || input), or 'reverse', "
            f"KL(input || target), got {direction!r}"
        )
    return _divergence.run(
        "kl_divergence_with_logits",
        _divergence.KL,
        input,
        target,
        reduction,
        input_first=direction == "reverse",
        beta=0.5,
        temperature=temperature,
        temperature_squared=temperature_squared,
        class_dim=class_dim,
        mask=mask,
        sample_weight=sample_weight,
    )


class KLDivergenceWithLogitsLoss(torch.nn.Module):
    """:func:`kl_divergence_with_logits` as a module. Mask and sample_weight are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self,
        reduction: str = "mean",
        *,
        direction: str = "forward",
        temperature: float = 1.0,
        temperature_squared: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction, self.direction, self.class_dim = reduction, direction, class_dim
        self.temperature, self.temperature_squared = temperature, temperature_squared

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The divergence of the student's logits and the teacher's; as :func:`kl_divergence_with_logits`."""
        return kl_divergence_with_logits(
            input,
            target,
            self.reduction,
            direction=self.direction,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            class_dim=self.class_dim,
            mask=mask,
            sample_weight=sample_weight,
        )
