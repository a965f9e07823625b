"""What is special about losses that map each row's nll, focal loss (test_focal_loss.py) apart."""

import fastloss
import pytest
import torch
import torch.nn.functional as F

CALLS = {
    "poly1_loss": {"epsilon": 2.0},
    "generalized_cross_entropy": {"q": 0.7},
    "token_scaled_cross_entropy": {},
}
MODULES = {
    "poly1_loss": fastloss.Poly1Loss,
    "generalized_cross_entropy": fastloss.GeneralizedCrossEntropyLoss,
    "token_scaled_cross_entropy": fastloss.TokenScaledCrossEntropyLoss,
}
by_loss = pytest.mark.parametrize("name", CALLS)


def composed(name, x, t, epsilon=1.0, q=0.7):
    """As users write them, a loss for each row."""
    p = x.softmax(1).gather(1, t.unsqueeze(1)).squeeze(1)
    nll = F.cross_entropy(x, t, reduction="none")
    if name == "poly1_loss":
        return nll + epsilon * (1 - p)
    return (1 - p**q) / q if name == "generalized_cross_entropy" else p.detach() * nll


def problem(*shape, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
    return x, t


@by_loss
@pytest.mark.parametrize("shape", ((6, 5), (4, 300), (2, 21, 16, 16)))
def test_definition(name, shape, device):
    x, t = problem(*shape, device=device)
    got, want = getattr(fastloss, name)(x, t, **CALLS[name]), composed(name, x, t, **CALLS[name]).mean()
    torch.testing.assert_close(got, want)
    (g,), (e,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(g, e)


@by_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_rows_that_are_certain_or_hopeless(name, dtype, device):
    """Values and gradients at logits of +-1e4."""
    hopeless = {"poly1_loss": 2e4 + 2, "generalized_cross_entropy": 1 / 0.7, "token_scaled_cross_entropy": 0.0}
    for sign, loss in ((1, 0.0), (-1, hopeless[name])):
        x = torch.zeros(4, 3, dtype=dtype, device=device)
        x[:, 0], x[:, 1] = sign * 1e4, -sign * 1e4
        x.requires_grad_()
        got = getattr(fastloss, name)(x, torch.zeros(4, dtype=torch.long, device=device), **CALLS[name])
        got.backward()
        assert torch.isfinite(x.grad).all() and abs(got.item() - loss) <= 1e-2 * loss


@by_loss
def test_infinite_logits(name, device):
    """-inf at another class is as if it were not there; at the target nothing is nan but a loss that has no bound."""
    x, t = problem(4, 5, device=device, dtype=torch.float32)
    function = getattr(fastloss, name)
    with torch.no_grad():
        x[:, 4] = -torch.inf
    t = t % 4
    got, want = function(x, t, **CALLS[name]), function(x[:, :4], t, **CALLS[name])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    hopeless = function(x, torch.full_like(t, 4), **CALLS[name])
    want = {"poly1_loss": torch.inf, "generalized_cross_entropy": 1 / 0.7, "token_scaled_cross_entropy": 0.0}[name]
    torch.testing.assert_close(hopeless.item(), want)
    assert torch.autograd.grad(hopeless, x)[0].isfinite().all()


def test_ends_of_the_parameters(device):
    """Cross entropy at epsilon 0 and towards q 0, the probability's absolute error at q 1."""
    x, t = problem(6, 9, device=device)
    nll = F.cross_entropy(x, t, reduction="none")
    torch.testing.assert_close(fastloss.poly1_loss(x, t, 0.0), nll.mean())
    torch.testing.assert_close(fastloss.generalized_cross_entropy(x, t, 1e-12), nll.mean())
    torch.testing.assert_close(fastloss.generalized_cross_entropy(x, t, 1.0), (1 - torch.exp(-nll)).mean())


def test_token_scaling_is_a_weight(device):
    """The same as cross entropy with p_t for a sample_weight, in value and in every derivative."""
    x, t = problem(6, 9, device=device)
    p = x.detach().softmax(1).gather(1, t.unsqueeze(1)).squeeze(1)
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"normalizer": 3.0}):
        got = fastloss.token_scaled_cross_entropy(x, t, **options).sum()
        want = fastloss.cross_entropy(x, t, sample_weight=p, **options).sum()
        torch.testing.assert_close(got, want)
        (g,), (e,) = (torch.autograd.grad(loss, x, create_graph=True) for loss in (got, want))
        torch.testing.assert_close(g, e)
        second = [torch.autograd.grad(grad.square().sum(), x)[0] for grad in (g, e)]
        torch.testing.assert_close(*second)


@by_loss
def test_module_and_errors(name, device):
    x, t = problem(6, 5, device=device)
    w = torch.rand(5, device=device) + 0.5
    function, options = getattr(fastloss, name), {"label_smoothing": 0.1, "z_loss": 0.1}
    module = MODULES[name](**CALLS[name], weight=w, **options)
    assert torch.equal(module(x, t), function(x, t, **CALLS[name], weight=w, **options))
    assert "z_loss=0.1" in repr(module) and all(f"{k}={v}" in repr(module) for k, v in CALLS[name].items())
    assert torch.equal(module.state_dict()["weight"], w)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        MODULES[name](alpha=0.25)
    with pytest.raises(IndexError, match="out of bounds"):
        function(x.cpu(), torch.full_like(t, 5).cpu())
    for argument, bad in {"epsilon": (-1.5, torch.inf, torch.nan), "q": (0.0, 1.2, torch.nan)}.items():
        for value in bad if argument in CALLS[name] else ():
            with pytest.raises(ValueError, match=rf"{name}\(\): {argument} must be .*{value}"):
                function(x, t, value)
