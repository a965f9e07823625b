"""Comparisons with a float64 reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, *, scale: float = 0.0, roundings: int = 64) -> None:
    """Assert that ``actual`` is ``expected`` (float64) computed in float32 (float64 if ``actual`` is) and rounded once.

    Infinities and nans must be the same. Elsewhere the error may be one unit in the last place of actual's dtype plus
    ``roundings`` units of the arithmetic's, the latter relative to the largest element or to ``scale``, the size of the
    terms that the result is a difference of, if that is larger.

    Raises:
        AssertionError: naming the first, or the largest, difference.
    """
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.numel():
        return
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = want.to(actual.dtype).isfinite()
    beyond = want.to(actual.dtype).double()
    same = (got == beyond) | (got.isnan() & beyond.isnan())
    if not (same | finite).all():
        at = tuple((~(same | finite)).nonzero()[0].tolist())
        raise AssertionError(f"at {at}: {got[at].item()}, expected {want[at].item()}")
    scale = max(scale, want[finite].abs().max().item() if finite.any() else 0.0)
    arithmetic = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    info = torch.finfo(actual.dtype)
    bound = info.eps * want.abs() + roundings * arithmetic * scale + info.tiny * info.eps
    error = torch.where(finite, (got - want).abs() - bound, 0.0).nan_to_num(nan=torch.inf)
    if (error > 0).any():
        at = tuple(torch.unravel_index(error.argmax(), error.shape))
        index = tuple(int(i) for i in at)
        raise AssertionError(
            f"at {index}: {got[at].item():.9g}, expected {want[at].item():.9g} within {bound[at].item():.3g}"
        )


def check_gradients(
    loss: Callable[..., Tensor], *args: Tensor, second_order: bool = True, forward_mode: bool = False, **kwargs: Any
) -> None:
    """Compare a loss's gradients with numerical ones, at float64 copies of these arguments.

    Args:
        loss: called as ``loss(*args, **kwargs)``; the derivatives are by every tensor that requires grad.
        second_order: also its second derivatives.
        forward_mode: also by forward-mode differentiation.

    Raises:
        torch.autograd.gradcheck.GradcheckError: if one is wrong.
    """

    def promoted(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().clone().requires_grad_(value.requires_grad)
        return value

    values = [promoted(value) for value in (*args, *kwargs.values())]
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]

    def of_leaves(*leaves: Tensor) -> Tensor:
        full = list(values)
        for place, leaf in zip(places, leaves, strict=True):
            full[place] = leaf
        return loss(*full[: len(args)], **dict(zip(kwargs, full[len(args) :], strict=True)))

    leaves = tuple(values[place] for place in places)
    torch.autograd.gradcheck(of_leaves, leaves, check_forward_ad=forward_mode)
    if second_order:
        torch.autograd.gradgradcheck(of_leaves, leaves, gen_non_contig_grad_outputs=True)
