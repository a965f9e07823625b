"""Errors in units in the last place stay within those recorded, on every instruction set (see docs/numerics.md)."""

import json
import sys
from pathlib import Path

import fastloss
import pytest
import torch
from fastloss._library import ops, set_isa

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import numerics_table

LIMITS = json.loads(numerics_table.LIMITS.read_text())
truths = {}


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request):
    before = ops.current_isa()
    if not ops.set_isa(request.param):
        pytest.skip(f"{request.param} is not in this build or not on this machine")
    yield request.param
    set_isa(before)


@pytest.mark.parametrize("dtype", numerics_table.DTYPES)
def test_errors_within_recorded_limits(dtype, isa):
    found = numerics_table.errors(fastloss.cross_entropy, numerics_table.DTYPES[dtype], truths)
    beyond = {
        f"{dtype}, {problem}": (errors, LIMITS[f"{dtype}, {problem}"])
        for problem, errors in found.items()
        if any(error > limit for error, limit in zip(errors, LIMITS[f"{dtype}, {problem}"], strict=True))
    }
    assert not beyond, f"error and limit of value and gradient, in ulp: {beyond}"
    assert len(found) == len(LIMITS) / len(numerics_table.DTYPES)


def test_exponential_over_its_whole_range(isa):
    """e^z to a few units in the last place down to the smallest normal number; there less than that number is lost."""
    z = torch.linspace(-104, 0, 40_000).view(40, 1000)  # a chunk a row: all relative to the same maximum
    z[0, :2] = torch.tensor([-torch.inf, -1e4])
    z = torch.cat([torch.zeros(40, 1), z], 1).requires_grad_()
    # With these weights softmax is e^z / 1; the target's own gradient is left out.
    total = z.detach().double().exp().sum(1)
    loss = fastloss.cross_entropy(z, torch.zeros(40).long(), sample_weight=total.float(), reduction="sum")
    (grad,) = torch.autograd.grad(loss, z)
    got, x = grad[:, 1:].double(), z.detach()[:, 1:].double()
    exact = x.exp() * (total.float().double() / total)[:, None]
    assert (got[0, :2] == 0).all()
    tiny = torch.finfo(torch.float32).tiny
    assert (got - exact)[exact < 2 * tiny].abs().max() < tiny
    normal = exact >= 2 * tiny
    ulp = ((got / exact - 1).abs() / torch.finfo(torch.float32).eps)[normal]
    slope = {"avx2": 40, "avx512": 40, "portable": 1.5}[isa]
    assert (ulp < 3 + x[normal].abs() / slope).all()


@pytest.mark.parametrize("classes", [821, 4000, 100_000])
def test_sums_over_many_strided_classes(classes, isa):
    """Rows whose classes are not adjacent keep the digits that contiguous rows have: no sum is one long chain."""
    gen = torch.Generator().manual_seed(0)
    rows = 8
    for logits in (torch.randn(classes, rows, generator=gen).t(), torch.randn(1, classes, rows, generator=gen) / 1000):
        row_shape = [logits.shape[0], *logits.shape[2:]]
        index = torch.randint(classes, row_shape, generator=gen)
        soft = torch.randn(logits.shape, generator=gen).softmax(1)
        for target, smoothing in ((index, 0.0), (index, 0.5), (soft, 0.0)):
            options = {"reduction": "none", "label_smoothing": smoothing}
            got = fastloss.cross_entropy(logits, target, **options)
            wide = target.double() if target is soft else target
            exact = torch.nn.functional.cross_entropy(logits.double(), wide, **options)
            torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_gradient_at_the_target_of_a_nearly_certain_row(isa):
    """others / sum, not p - 1: 15 digits in float64, 6 in float32, where 1 - p is e^-30."""
    x = torch.zeros(1, 300, dtype=torch.float64)
    x[0, 7] = 30.0
    exact = -299 / (torch.exp(torch.tensor(30.0, dtype=torch.float64)).item() + 299)
    for dtype, relative in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        for path in (True, False):
            leaf = x.to(dtype, copy=True).requires_grad_()
            loss = fastloss.cross_entropy(leaf, torch.tensor([7]), grad_in_forward=path)
            loss.backward()
            assert leaf.grad[0, 7].item() == pytest.approx(exact, rel=relative)
            assert loss.item() == pytest.approx(-exact, rel=relative * 10)  # log(1 + r) is about r
