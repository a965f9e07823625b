"""Jagged nested tensors: losses of their values, with results of elements and rows nested as the input is."""

import fastloss
import pytest
import torch

ELEMENTWISE = (
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "charbonnier_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "l1_loss",
    "log_cosh_loss",
    "mape_loss",
    "mse_loss",
    "poisson_nll_loss",
    "quantile_loss",
    "relative_l1_loss",
    "rmse_loss",
    "rmsle_loss",
    "sigmoid_focal_loss",
    "smape_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
)
OF_ROWS = (
    "cross_entropy",
    "focal_loss",
    "generalized_cross_entropy",
    "multi_margin_loss",
    "nll_loss",
    "poly1_loss",
    "token_scaled_cross_entropy",
)
LENGTHS = (2, 4, 0, 1)
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def nested(*shape, device, like=None, integers=0, seed=0):
    """Of LENGTHS[i] times ``shape`` for each sample."""
    generator = torch.Generator().manual_seed(seed)
    if integers:
        parts = [torch.randint(integers, (n, *shape), generator=generator) for n in LENGTHS]
    else:
        parts = [torch.randn((n, *shape), generator=generator, dtype=torch.float64) for n in LENGTHS]
    if like is not None:
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts).to(device), like.offsets())
    return torch.nested.nested_tensor(parts, layout=torch.jagged, device=device).requires_grad_()


def held(loss, x, t, reduction, **options):
    """Value and gradient of the nested call against those of the values."""
    inner = {k: v.values() if v.is_nested else v for k, v in options.items()}
    values = x.detach().values().requires_grad_()
    got, want = loss(x, t, reduction=reduction, **options), loss(values, t.values(), reduction=reduction, **inner)
    if reduction == "none":
        assert got.is_nested and got.shape[:2] == x.shape[:2]
        got = got.values()
    same = {"rtol": 0, "atol": 0, "equal_nan": True}  # rmsle_loss has no value below -1
    torch.testing.assert_close(got, want, **same)
    g = torch.linspace(0.5, 1.5, max(got.numel(), 1), dtype=got.dtype, device=got.device).view(got.shape)
    (a,), (b,) = torch.autograd.grad(got, x, g), torch.autograd.grad(want, values, g)
    assert a.shape == x.shape
    torch.testing.assert_close(a.values(), b, **same)


@pytest.mark.parametrize("name", ELEMENTWISE)
@reductions
def test_elementwise(name, reduction, device):
    x = nested(3, device=device)
    t = nested(3, device=device, like=x, seed=1)
    held(getattr(fastloss, name), x, t, reduction)
    mask = torch.nested.nested_tensor_from_jagged(t.values() > 0, x.offsets())
    held(getattr(fastloss, name), x, t, reduction, mask=mask)


@pytest.mark.parametrize("name", OF_ROWS)
@reductions
def test_rows(name, reduction, device):
    x = nested(3, device=device)
    held(getattr(fastloss, name), x, nested(device=device, like=x, integers=3), reduction)


def test_what_else_they_take(device):
    x = nested(3, device=device)
    t, c = nested(3, device=device, like=x, seed=1), nested(device=device, like=x, integers=3)
    held(fastloss.cross_entropy, x, torch.nested.nested_tensor_from_jagged(t.values().softmax(-1), x.offsets()), "none")
    by_class = torch.tensor([1.0, 2.0, 3.0], device=device)
    held(fastloss.cross_entropy, x, c, "mean", weight=by_class)
    held(fastloss.binary_cross_entropy_with_logits, x, t, "mean", pos_weight=by_class)
    held(fastloss.smooth_l1_loss, x, t, "none", beta=by_class)
    deep, of_deep = nested(2, 3, device=device), None
    of_deep = nested(2, device=device, like=deep, integers=3)
    got = fastloss.cross_entropy(deep, of_deep, class_dim=-1, reduction="none")
    assert torch.equal(
        got.values(), fastloss.cross_entropy(deep.values(), of_deep.values(), class_dim=-1, reduction="none")
    )
    loss, stats = fastloss.cross_entropy(x, c, return_stats=True)
    assert loss.dim() == 0 and stats.accuracy.dim() == 0 and stats.argmax.shape == c.shape
    assert torch.equal(fastloss.CrossEntropyLoss()(x, c), fastloss.cross_entropy(x, c))
    assert torch.equal(fastloss.MSELoss()(x, t), fastloss.mse_loss(x, t))
    with torch.device(device):  # a mode
        assert torch.equal(fastloss.mse_loss(x, t), fastloss.mse_loss(x.values(), t.values()))


def test_sample_weights_are_of_samples_or_of_rows(device):
    x = nested(3, device=device)
    t, c = nested(3, device=device, like=x, seed=1), nested(device=device, like=x, integers=3)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    each = torch.tensor([1.0, 1, 2, 2, 2, 2, 4], device=device)
    for loss, target in ((fastloss.mse_loss, t), (fastloss.cross_entropy, c)):
        want = loss(x.values(), target.values(), sample_weight=each)
        assert torch.equal(loss(x, target, sample_weight=weights), want)
        by_row = torch.nested.nested_tensor_from_jagged(each, x.offsets())
        assert torch.equal(loss(x, target, sample_weight=by_row), want)


def test_equal_offsets_of_another_tensor_are_the_same(device):
    x, t = nested(3, device=device), nested(3, device=device, seed=1)
    if device == "cpu":
        assert torch.equal(fastloss.mse_loss(x, t), fastloss.mse_loss(x.values(), t.values()))
    else:  # nothing is compared there
        with pytest.raises(ValueError, match="different offsets"):
            fastloss.mse_loss(x, t)


def test_errors(device):
    x = nested(3, device=device)
    c = nested(device=device, like=x, integers=3)
    others = torch.nested.nested_tensor(
        [torch.ones(n, 3) for n in (1, 1, 4, 1)], layout=torch.jagged, device=device, dtype=x.dtype
    )
    holes = torch.nested.narrow(
        torch.ones(4, 5, 3, device=device), 1, torch.zeros(4, dtype=torch.int64), torch.tensor(LENGTHS), torch.jagged
    )
    mask = torch.ones(7, 3, dtype=torch.bool, device=device)
    for call, kind, words in (
        (lambda: fastloss.mse_loss(x, torch.ones(7, 3, device=device)), NotImplementedError, "target of shape"),
        (lambda: fastloss.mse_loss(torch.ones(7, 3, device=device), x), NotImplementedError, "input of shape"),
        (lambda: fastloss.mse_loss(x, others), ValueError, "different offsets"),
        (lambda: fastloss.mse_loss(holes, holes), NotImplementedError, "contiguous"),
        (lambda: fastloss.mse_loss(x.transpose(1, 2), x.transpose(1, 2)), NotImplementedError, "dimension 1"),
        (lambda: fastloss.mse_loss(x, x, mask=mask), ValueError, "mask of shape"),
        (lambda: fastloss.mse_loss(x, x, sample_weight=mask[0].float()), ValueError, "one for each sample"),
        (lambda: fastloss.rmse_loss(x, x, dim=1), NotImplementedError, "dim=1"),
        (lambda: fastloss.cross_entropy(x, c, class_dim=1), ValueError, "classes last"),
        (lambda: fastloss.cross_entropy(c.double(), c), ValueError, "classes last"),
        (lambda: fastloss.dice_loss(x, c), NotImplementedError, r"input\.values\(\)"),
        (lambda: fastloss.mse_loss(x, [1.0]), TypeError, "target"),
    ):
        with pytest.raises(kind, match=words) as error:
            call()
        assert "to_dense" not in str(error.value)


def test_what_explain_says_of_them(device):
    x = nested(3, device=device)
    explanation = fastloss.explain(fastloss.mse_loss, x, nested(3, device=device, like=x, seed=1))
    assert explanation.handled_by == "fastloss" and explanation.forward


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_hear_of_the_jagged_layout(device):
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], device=device)
    dense = torch.ones(2, 3, device=device)
    names = (*ELEMENTWISE, *OF_ROWS, "dice_loss", "cosine_distance_loss", "token_log_probs")
    for name in names:
        for arguments in ((x, x), (dense, x)):
            with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
                getattr(fastloss, name)(*arguments)
    with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
        fastloss.linear_cross_entropy(x, torch.ones(4, 3, device=device), x)
