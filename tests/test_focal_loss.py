"""What is special about softmax focal loss: its definition, its limits, what others get wrong."""

import importlib
import importlib.util

import fastloss
import pytest
import torch
import torch.nn.functional as F


def problem(*shape, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
    return x, t


def composed(x, t, gamma, weight=None):
    """As its users write it, weights kept out of the probability."""
    nll = F.cross_entropy(x, t, reduction="none")
    rows = (1 - torch.exp(-nll)) ** gamma * nll
    if weight is None:
        return rows.mean()
    counts = t != -100
    w = torch.where(counts, weight[torch.where(counts, t, 0)], 0.0)
    return (w * rows).sum() / w.sum()


@pytest.mark.parametrize("shape", ((6, 5), (4, 300), (2, 3, 4, 5), (2, 21, 16, 16)))
@pytest.mark.parametrize("gamma", (0.5, 1.0, 2.0, 5.0))
def test_definition(shape, gamma, device):
    x, t = problem(*shape, device=device)
    t.view(-1)[::4] = -100
    w = torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5
    got, want = fastloss.focal_loss(x, t, gamma, w), composed(x, t, gamma, w)
    torch.testing.assert_close(got, want)
    (g,), (e,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(g, e)


def test_gamma_0_is_cross_entropy(device):
    x, t = problem(6, 9, device=device, dtype=torch.float32)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"z_loss": 0.1}):
        got = fastloss.focal_loss(x, t, 0.0, **options)
        torch.testing.assert_close(got, fastloss.cross_entropy(x, t, **options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gamma", (0.5, 2.0))
def test_rows_that_are_certain_or_hopeless(dtype, gamma, device):
    """No nan at (1 - p) = 0, no infinity where the loss is finite."""
    for sign, loss in ((1, 0.0), (-1, 2e4)):
        x = torch.zeros(4, 3, dtype=dtype, device=device)
        x[:, 0], x[:, 1] = sign * 1e4, -sign * 1e4
        x.requires_grad_()
        got = fastloss.focal_loss(x, torch.zeros(4, dtype=torch.long, device=device), gamma)
        got.backward()
        assert torch.isfinite(x.grad).all() and abs(got.item() - loss) <= 1e-2 * loss


def test_small_losses_keep_their_digits(device):
    """(1 - p)^2 nll of a nearly certain row is about nll^3: 1 - exp(-nll) in float32 would have none."""
    x = torch.tensor([[12.0, 0.0]], device=device, requires_grad=True)
    t = torch.zeros(1, dtype=torch.long, device=device)
    got = fastloss.focal_loss(x, t)
    got.backward()
    exact = x.detach().double().requires_grad_()
    nll = F.softplus(exact[:, 1] - exact[:, 0])
    want = ((-torch.expm1(-nll)) ** 2 * nll).mean()
    want.backward()
    assert abs(got.item() / want.item() - 1) < 1e-5
    assert (x.grad.double() / exact.grad - 1).abs().max() < 1e-5


def test_one_hot_probabilities_are_class_indices(device):
    """With weights and smoothing as well."""
    x, t = problem(6, 5, device=device)
    w = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    hot = F.one_hot(t, 5).double()
    for options in ({}, {"weight": w}, {"weight": w, "label_smoothing": 0.2}):
        rows = [fastloss.focal_loss(x, target, reduction="none", **options) for target in (t, hot)]
        torch.testing.assert_close(*rows)


def test_normalizer_gives_other_packages_mean(device):
    x, t = problem(6, 5, device=device)
    w = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    got = fastloss.focal_loss(x, t, weight=w, normalizer=t.numel())
    torch.testing.assert_close(got, fastloss.focal_loss(x, t, weight=w, reduction="none").mean())


@pytest.mark.parametrize("gamma", (0.5, 2.0))
def test_the_same_as_kornia_and_monai(gamma, device):
    """They leave the classes in, all but the target's of which are 0."""
    x, t = problem(2, 3, 4, 5, device=device)
    ignored = t.clone()
    ignored[:, 1] = 1
    hot = F.one_hot(t, 3).movedim(-1, 1).double()
    alpha = torch.tensor([0.7, 0.3, 0.3], dtype=torch.float64, device=device)
    pairs = []
    if importlib.util.find_spec("kornia"):
        kornia = importlib.import_module("kornia.losses").focal_loss
        pairs += [
            (kornia(x, t, alpha=None, gamma=gamma), fastloss.focal_loss(x, t, gamma, reduction="none")),
            (kornia(x, t, alpha=0.3, gamma=gamma), fastloss.focal_loss(x, t, gamma, alpha, reduction="none")),
            (
                kornia(x, ignored, alpha=None, gamma=gamma, ignore_index=1),
                fastloss.focal_loss(x, ignored, gamma, ignore_index=1, reduction="none"),
            ),
        ]
    if importlib.util.find_spec("monai"):
        monai = importlib.import_module("monai.losses").FocalLoss(use_softmax=True, gamma=gamma, reduction="none")
        pairs.append((monai(x, hot), fastloss.focal_loss(x, t, gamma, reduction="none")))
    if not pairs:
        pytest.skip("neither kornia nor monai is installed")
    for theirs, ours in pairs:
        results = [(rows, *torch.autograd.grad(rows.sum(), x)) for rows in (theirs.sum(1), ours)]
        torch.testing.assert_close(*results, check_dtype=False, rtol=1e-6, atol=1e-7)


def test_module_and_errors(device):
    x, t = problem(6, 5, device=device)
    w = torch.rand(5, device=device) + 0.5
    module = fastloss.FocalLoss(1.5, w, z_loss=0.1)
    assert torch.equal(module(x, t), fastloss.focal_loss(x, t, 1.5, w, z_loss=0.1)) and "z_loss=0.1" in repr(module)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        fastloss.focal_loss(x, t, -1.0)
    with pytest.raises(ValueError, match="gamma must not be negative or infinite, got inf"):
        fastloss.focal_loss(x, t, float("inf"))
    with pytest.raises(ValueError, match="softcap must be positive and finite, or None, got inf"):
        fastloss.focal_loss(x, t, softcap=float("inf"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        fastloss.FocalLoss(alpha=0.25)
    with pytest.raises(IndexError, match="out of bounds"):
        fastloss.focal_loss(x.cpu(), torch.full_like(t, 5).cpu())
    _, stats = fastloss.focal_loss(x, t, return_stats=True)
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=x.detach()).entropy())
