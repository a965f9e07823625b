"""The mean's denominator, given: accumulated micro-batches have the whole batch's loss and gradient."""

import fastloss
import pytest
import torch


def test_accumulated_micro_batches_are_the_whole_batch(device):
    x = torch.randn(8, 11, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.randint(11, (8,), device=device)
    t[[1, 2, 3, 6]] = -100  # micro-batches with different counts
    counted = (t != -100).sum()
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "label_smoothing": 0.1}):
        whole = fastloss.cross_entropy(x, t, **options)
        (want,) = torch.autograd.grad(whole, x)
        for normalizer in (counted, int(counted), float(counted), counted.double()):
            parts = [
                fastloss.cross_entropy(x[i : i + 2], t[i : i + 2], normalizer=normalizer, **options)
                for i in range(0, 8, 2)
            ]
            torch.testing.assert_close(sum(parts), whole)
            torch.testing.assert_close(torch.autograd.grad(sum(parts), x)[0], want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_every_path(dtype, device):
    x = torch.randn(6, 7, device=device, dtype=dtype, requires_grad=True)
    t = torch.randint(7, (6,), device=device)
    for options in ({"grad_in_forward": True}, {"grad_in_forward": False}):
        loss = fastloss.cross_entropy(x, t, normalizer=12, **options)
        (g,) = torch.autograd.grad(loss, x)
        (half,) = torch.autograd.grad(fastloss.cross_entropy(x, t, **options), x)
        torch.testing.assert_close(g, half / 2, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)


def test_nothing_counts(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    loss = fastloss.cross_entropy(x, torch.full((3,), -100, device=device), normalizer=5)
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_errors(device):
    x, t = torch.randn(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    for normalizer, options, kind, words in (
        (3, {"reduction": "sum"}, ValueError, "reduction='mean'"),
        (-1, {}, ValueError, "must not be negative"),
        (torch.ones(2, device=device), {}, ValueError, "one real number"),
        (torch.ones((), device=device, requires_grad=True), {}, RuntimeError, "not differentiable"),
        ("all", {}, TypeError, "normalizer"),
    ):
        with pytest.raises(kind, match=words):
            fastloss.cross_entropy(x, t, normalizer=normalizer, **options)


@pytest.mark.parametrize("loss", (fastloss.cross_entropy, fastloss.focal_loss))
def test_a_weighted_mean_divided_by_the_count(loss, device):
    """Instead of by the sum of the weights of the targets."""
    x = torch.randn(6, 5, device=device, requires_grad=True)
    t, w = torch.tensor([0, 4, -100, 2, 2, -100], device=device), torch.linspace(0.2, 3, 5, device=device)
    got = loss(x, t, weight=w, normalizer=(t != -100).sum())
    want = loss(x, t, weight=w, reduction="none").sum() / 4
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
