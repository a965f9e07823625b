"""Jensen-Shannon divergence of two softmaxes, from their logits; see ``csrc/rowwise/divergence.h``."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from . import _divergence

_LEAST = 1e-6  # of beta and of 1 - beta: float32 tells it from 0 and 1


@recordable
def js_divergence_with_logits(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Jensen-Shannon divergence of two softmaxes (Lin, 1991), weighted as in distillation (Agarwal et al., GKD, 2024).

    With s = softmax(input / temperature), t = softmax(target / temperature) and the mixture
    m = beta t + (1 - beta) s, a row's divergence is ``beta KL(t || m) + (1 - beta) KL(s || m)``, which is finite
    whatever the logits rule out: at most log 2 for a beta of 1/2. TRL's ``generalized_jsd_loss`` for a beta inside
    (0, 1); its special cases 0 and 1 are :func:`kl_divergence_with_logits`, forward and reverse.

    Both logits are read once, and each gradient that is wanted is written once; no softmax is ever in memory.

    Args:
        input: the student's logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16,
            any strides.
        target: the teacher's logits, the same shape; any of these dtypes. Differentiable as well.
        beta: weight of the teacher in the mixture, from 1e-6 to 1 - 1e-6.
        reduction, temperature, temperature_squared, class_dim, mask, sample_weight: as
            :func:`kl_divergence_with_logits`.

    Returns:
        The loss: as :func:`kl_divergence_with_logits`.

    Raises:
        ValueError: beta out of its range.
        ValueError, IndexError, RuntimeError, TypeError, NotImplementedError: as :func:`kl_divergence_with_logits`.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0]])
        >>> fastloss.js_divergence_with_logits(student, teacher)
        tensor(0.1010)
    """
    if has_torch_function_variadic(input, target, mask, sample_weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        operands = (input, target, mask, sample_weight)
        return handle_torch_function(js_divergence_with_logits, operands, input, target, **options)
    if recording():
        return record("js_divergence_with_logits", locals())
    beta = float(_arguments.as_float("js_divergence_with_logits", "beta", beta))
    if not _LEAST <= beta <= 1 - _LEAST:
        raise ValueError(
            f"js_divergence_with_logits(): beta must be inside (0, 1), from {_LEAST} to 1 - {_LEAST}, got {beta}; the "
            "divergence vanishes at both ends. TRL's beta=0 is kl_divergence_with_logits, its beta=1 the same with "
            "direction='reverse'"
        )
    return _divergence.run(
        "js_divergence_with_logits",
        _divergence.JS,
        input,
        target,
        reduction,
        input_first=False,
        beta=beta,
        temperature=temperature,
        temperature_squared=temperature_squared,
        class_dim=class_dim,
        mask=mask,
        sample_weight=sample_weight,
    )


class JSDivergenceWithLogitsLoss(torch.nn.Module):
    """:func:`js_divergence_with_logits` as a module. Mask and sample_weight are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self,
        reduction: str = "mean",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction, self.beta, self.class_dim = reduction, beta, class_dim
        self.temperature, self.temperature_squared = temperature, temperature_squared

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The divergence of the student's logits and the teacher's; as :func:`js_divergence_with_logits`."""
        return js_divergence_with_logits(
            input,
            target,
            self.reduction,
            beta=self.beta,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            class_dim=self.class_dim,
            mask=mask,
            sample_weight=sample_weight,
        )
