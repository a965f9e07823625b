"""Gaussian negative log likelihood. The mathematics is in ``csrc/pointwise/losses/distributions.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._library import REDUCTIONS
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise


@recordable
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Gaussian negative log likelihood; a drop-in for :func:`torch.nn.functional.gaussian_nll_loss`.

    The loss of an element is ``(log(v) + (input - target)**2 / v) / 2``, v = max(var, eps) (Nix and Weigend, 1994).
    The bound is not differentiated: below it the derivative by var is that at eps, as torch's.

    Args:
        input: expectations, any shape; float32, float64, float16 or bfloat16, any strides.
        target: what was observed, floating or integer; another shape is broadcast, without a copy. Differentiable.
        var: variances, one for each element; or for all elements along one dimension, of the input's shape with a 1 in
            its place, or without the last one; or a float for all. Broadcast without a copy. Differentiable.
        full: add ``log(2 pi) / 2``, which no operand changes.
        eps: the least variance that is divided by.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss in nats: shape () or, for ``'none'``, the broadcast shape; dtype promoted over the three operands.

    Raises:
        ValueError: a negative variance, a var of another size, an unknown reduction. On CUDA a negative variance gives
            nan and is raised by a later call, see :func:`fastloss.set_error_mode`; torch waits for the GPU.
        RuntimeError, NotImplementedError, TypeError: as torch, for sizes, dtypes and arguments.

    Example, a network that says how sure it is::

        >>> loss = fastloss.gaussian_nll_loss(mean, observed, log_var.exp())
    """
    name = "gaussian_nll_loss"
    if has_torch_function_variadic(input, target, var):
        options: dict[str, Any] = {"full": full, "eps": eps, "reduction": reduction}
        options |= {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return handle_torch_function(gaussian_nll_loss, (input, target, var), input, target, var, **options)
    if isinstance(var, float):
        if var < 0:
            raise ValueError(f"var has negative entry/entries: expected 0 or more, got {var}")
    elif not isinstance(var, Tensor):
        raise TypeError(f"{name}(): argument 'var' must be Tensor or float, not {type(var).__name__}")
    if recording():
        arguments = locals()
        if isinstance(var, float):
            _arguments.require_tensor("input", input, name)
            arguments["var"] = torch.full_like(input, var)
        return record("gaussian_nll_loss", arguments)
    _arguments.require_tensor("input", input, name)
    _arguments.require_tensor("target", target, name)
    if isinstance(var, Tensor) and var.shape != input.shape:
        var = _in_its_place(var, input)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not valid: reduction is 'none', 'mean' or 'sum'")
    if torch.bool in (input.dtype, target.dtype):
        raise RuntimeError(f"{name}(): subtraction with a bool tensor is not supported; convert it to a number")
    x = _pointwise.checked(name, input, target, reduction, weight, sample_weight, mask, broadcasts=True)
    if not isinstance(var, Tensor):
        of_input = input.dtype if input.is_floating_point() else x.dtype
        var = torch.full((), var, dtype=of_input, device=input.device)
    x = _pointwise.with_further(name, x, {"var": var})
    if not input.is_cuda:  # where autocast leaves it alone
        x = x._replace(dtype=torch.promote_types(torch.promote_types(input.dtype, target.dtype), var.dtype))
    eps = _arguments.as_float(name, "eps", eps)
    if eps != eps:
        raise ValueError(f"{name}(): eps must be a number, got {eps}")
    params = (float(eps), float(bool(full)))
    return _pointwise.reported(_pointwise.run_checked(x, name, params), input)


def _in_its_place(var: Tensor, input: Tensor) -> Tensor:
    """Variances of another shape than the input's, so that they broadcast to it."""
    if input.shape[:-1] == var.shape:
        return var.unsqueeze(-1)
    if input.dim() == var.dim() and sum(y for x, y in zip(input.shape, var.shape, strict=True) if x != y) == 1:
        return var
    raise ValueError(
        f"var is of incorrect size: {list(var.shape)} for an input of {list(input.shape)}; expected that size, with a "
        "1 in one place, or without the last one"
    )


class GaussianNLLLoss(torch.nn.GaussianNLLLoss):
    """:func:`gaussian_nll_loss` as a module; a drop-in for :class:`torch.nn.GaussianNLLLoss`.

    Weights and mask are arguments of the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        var: Tensor | float,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of expectations and variances; shapes, dtypes and errors as :func:`gaussian_nll_loss`."""
        return gaussian_nll_loss(
            input,
            target,
            var,
            self.full,
            self.eps,
            self.reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
