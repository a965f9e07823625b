"""What is special about losses over a class axis without a softmax."""

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.losses._row_loss import NAMES
from fastloss.testing import SPECS, check_gradients
from fastloss.testing.row_losses import LOSSES
from torch.utils._python_dispatch import TorchDispatchMode

OURS, THEIRS = fastloss.multi_margin_loss, F.multi_margin_loss


def rows(*shape, device="cpu", **options):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, **options)
    t = torch.arange(x.numel() // shape[1], device=device).reshape(shape[0], *shape[2:]) % shape[1]
    return x, t


def test_every_loss_has_a_spec():
    assert list(LOSSES) == NAMES and set(NAMES) <= set(SPECS)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("p, margin", ((1, 1.0), (2, 0.3), (1, 0.0), (2, -1.0)))
def test_multi_margin_loss_as_torch(p, margin, reduction, device):
    x, t = rows(40, 17, device=device)
    for weight in (None, torch.rand(17, dtype=x.dtype, device=device)):
        options = {"p": p, "margin": margin, "weight": weight, "reduction": reduction}
        results = []
        for loss in (OURS, THEIRS):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, t, **options)
            results.append((value, *torch.autograd.grad(value, leaf, torch.rand_like(value.detach()).fill_(0.7))))
        torch.testing.assert_close(*results)
    module = fastloss.MultiMarginLoss(p=p, margin=margin, weight=weight, reduction=reduction)
    assert torch.equal(module(x, t), OURS(x, t, p, margin, weight, reduction=reduction))


@pytest.mark.parametrize("shape", ((3, 4, 5), (2, 5, 3, 4), (2, 3, 2, 1, 3)), ids=str)
def test_multi_margin_loss_of_spatial_inputs(shape, device):
    """Beyond torch: as for the rows."""
    x, t = rows(*shape, device=device)
    flat = x.movedim(1, -1).reshape(-1, shape[1])
    for reduction in ("none", "mean", "sum"):
        got, want = OURS(x, t, reduction=reduction), THEIRS(flat, t.reshape(-1), reduction=reduction)
        torch.testing.assert_close(got, want.reshape(got.shape))
    check_gradients(OURS, x.requires_grad_(), t, p=2)


@pytest.mark.parametrize("shape", ((5,), (1, 5)), ids=str)
def test_multi_margin_loss_of_one_row(shape, device):
    x = torch.linspace(0.4, -0.3, 5, device=device).reshape(shape)
    for t in (torch.tensor(2, device=device), torch.tensor([2], device=device)):
        for reduction in ("none", "mean", "sum"):
            torch.testing.assert_close(OURS(x, t, reduction=reduction), THEIRS(x, t, reduction=reduction))


def test_multi_margin_loss_errors(device):
    x, t = rows(4, 5, device=device)
    for kind, text, args, options in (
        (ValueError, "only p == 1 and p == 2 supported, got 3", (x, t), {"p": 3}),
        (ValueError, "weight must be one-dimensional", (x, t), {"weight": x}),
        (RuntimeError, "inconsistent weight size", (x, t), {"weight": x[0, :3]}),
        (RuntimeError, "Expected target size .4., but got .3.", (x, t[:3]), {}),
        (RuntimeError, "target tensor should be 1-D", (x, t.unsqueeze(1)), {}),
        (RuntimeError, "Expected non-empty vector or matrix", (x[:, :0], t), {}),
        (RuntimeError, "expected scalar type Long but found Double", (x, t.double()), {}),
        (ValueError, "is not a valid value for reduction", (x, t), {"reduction": "nope"}),
    ):
        with pytest.raises(kind, match=text):
            OURS(*args, **options)
        with pytest.raises(kind):
            THEIRS(*args, **options)
    with pytest.raises(TypeError, match="argument 'margin' must be float"):
        OURS(x, t, margin="wide")
    for value in (5, -1, -100):  # nothing is ignored
        t[2] = value
        kind = IndexError if x.is_cuda else RuntimeError  # as torch; of a GPU nobody knows whose error it is
        with pytest.raises(kind, match=f"Target {value} is out of bounds"):
            OURS(x, t)
            fastloss.check_errors()
        with pytest.raises(RuntimeError, match="target out of range"):
            THEIRS(x.cpu(), t.cpu())


def test_rows_of_one_class_and_no_rows(device):
    x = torch.tensor(0.3, device=device, dtype=torch.float64)
    t = torch.tensor(0, device=device)
    assert OURS(x, t) == THEIRS(x, t) == 0
    none = torch.zeros(0, 5, device=device)
    assert torch.isnan(OURS(none, t.new_zeros(0))) and OURS(none, t.new_zeros(0), reduction="sum") == 0


class Copies(TorchDispatchMode):
    """Counts operators of torch's that make tensors of some size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = str(function).startswith("aten.") and isinstance(result, torch.Tensor) and result.numel() >= self.size
        if made and result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
            self.made.append(str(function))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name, device):
    """Values and gradients as for a copy, whether the kernels can walk the strides or a copy is made for them."""
    loss = getattr(fastloss, name)
    base = torch.randn(4, 6, 5, 8, 3, dtype=torch.float64, device=device)
    for view in (
        base[:, :4],
        base[::2],
        base[..., 0],
        base[0],
        base.permute(0, 4, 2, 3, 1),
        base.permute(0, 2, 4, 1, 3),
        base[:1, :1].expand(2, 3, 5, 8, 3),
        base.transpose(0, 1)[:, :2, 0, 0, 0],
    ):
        t = torch.arange(view.numel() // view.shape[1], device=device).reshape(view.shape[0], *view.shape[2:])
        t = t % view.shape[1]
        results = []
        for x in (view.detach().requires_grad_(), view.contiguous().detach().requires_grad_()):
            value = loss(x, t, reduction="none")
            results.append(
                (value, *torch.autograd.grad(value, x, torch.linspace(1, 2, t.numel()).view_as(value).to(x)))
            )
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_walked_is_not_copied(name, device):
    loss = getattr(fastloss, name)
    base = torch.randn(8, 30, 10, 10, device=device)
    for view in (base[:, :19], base[::2], base.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), base[..., 0]):
        t = torch.zeros(view.shape[0], *view.shape[2:], dtype=torch.int64, device=device)
        with Copies(view.numel()) as copies:
            loss(view, t)
        assert copies.made == []
        assert "copy" not in fastloss.explain(loss, view, t).kernel
    awkward = base.permute(0, 2, 1, 3)[:, :, ::4]
    t = torch.zeros(8, 8, 10, dtype=torch.int64, device=device)
    assert "copy" in fastloss.explain(loss, awkward, t).kernel
