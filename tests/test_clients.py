"""tools/clients.py: every call of a loss is counted, and each that fastloss does not serve is named."""

import importlib.util
import sys
import types
from pathlib import Path

import fastloss
import pytest
import torch
import torch.nn.functional as F

SPEC = importlib.util.spec_from_file_location("clients", Path(__file__).parent.parent / "tools" / "clients.py")
clients = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(clients)
TORCHS_CROSS_ENTROPY = F.cross_entropy


def train():
    x, t = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.tensor([0, 4, 1, 2])

    def sigmoid_focal_loss():  # as torchvision writes it
        return F.binary_cross_entropy_with_logits(x, x.detach().sigmoid())

    losses = [torch.nn.CrossEntropyLoss()(x, t), F.nll_loss(F.log_softmax(x, -1), t), sigmoid_focal_loss()]
    losses += [-x.log_softmax(1).mean(), x.logsumexp(1).mean(), -F.logsigmoid(x).mean(), TORCHS_CROSS_ENTROPY(x, t)]
    losses += [F.multilabel_margin_loss(x, torch.zeros(4, 5, dtype=torch.int64)), F.mse_loss(x, 2 * x).detach()]
    return torch.stack(losses)


def test_calls_are_counted_and_named():
    with clients.Calls() as calls:
        train()
    assert calls.count == {
        **{"cross_entropy": 2, "nll_loss": 1, "log_softmax": 2, "sigmoid_focal_loss": 1, "logsumexp": 1},
        **{"logsigmoid": 1, "multilabel_margin_loss": 1, "mse_loss": 1},
    }
    assert not calls.inside
    del calls.count["sigmoid_focal_loss"]  # of a torchvision that is not there
    with fastloss.patch(report=True, log_softmax=True):
        train()
    result = clients.tally(calls, fastloss.patch_report())
    assert result["served"] == {"cross_entropy": 1, "nll_loss": 1, "mse_loss": 1}
    left = {(name, count): reason for name, count, reason in result["left"]}
    assert "does not reach" in left.pop(("cross_entropy", 1)) and "fewer than" in left.pop(("log_softmax", 2))
    assert set(left) == {("logsumexp", 1), ("logsigmoid", 1), ("multilabel_margin_loss", 1)}
    calls.count["mse_loss"] = 0
    with pytest.raises(RuntimeError, match="mse_loss: 0 calls without the patch, 1 with it"):
        clients.tally(calls, fastloss.patch_report())


@pytest.fixture
def smoothing(monkeypatch):
    """A class where timm has its own, which makes its loss by hand."""
    module = types.ModuleType("timm.loss.cross_entropy")

    class LabelSmoothingCrossEntropy(torch.nn.Module):
        smoothing, confidence = 0.1, 0.9

        def forward(self, x, target):
            logp = F.log_softmax(x, -1)
            return self.confidence * F.nll_loss(logp, target) - self.smoothing * logp.mean()

    method = LabelSmoothingCrossEntropy.forward
    LabelSmoothingCrossEntropy.forward = types.FunctionType(method.__code__, {"F": F, "__name__": module.__name__})
    LabelSmoothingCrossEntropy.__module__ = module.__name__
    module.LabelSmoothingCrossEntropy = LabelSmoothingCrossEntropy
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return LabelSmoothingCrossEntropy


def test_a_class_by_hand_counts_as_its_calls(smoothing):
    x, t, loss = torch.randn(4, 5), torch.tensor([0, 4, 1, 2]), smoothing()

    def steps(count, of=loss, t=t):
        return torch.stack([of(x, t) for _ in range(count)] + [F.nll_loss(x.log_softmax(1), t)])

    with clients.Calls() as calls:
        plain = steps(3)
    assert calls.count == {"log_softmax": 1, "nll_loss": 1}
    assert calls.inside == {"timm.LabelSmoothingCrossEntropy": {"log_softmax": 3, "nll_loss": 3}}
    assert calls.classes == {"timm.LabelSmoothingCrossEntropy": 3}
    with fastloss.patch(report=True, log_softmax=True):
        torch.testing.assert_close(steps(3), plain)
    result = clients.tally(calls, fastloss.patch_report())
    name = "of timm.LabelSmoothingCrossEntropy"
    assert result["served"] == {f"log_softmax {name}": 3, f"nll_loss {name}": 3, "nll_loss": 1}
    assert [left[:2] for left in result["left"]] == [("log_softmax", 1)]

    with fastloss.patch(log_softmax=True):
        steps(2)
    with pytest.raises(RuntimeError, match="3 calls without the patch, 2 served"):
        clients.tally(calls, fastloss.patch_report())

    loss.another = 1  # an option that leaves the class to itself
    with fastloss.patch(report=True, log_softmax=True):
        steps(3)
    result = clients.tally(calls, fastloss.patch_report())
    assert result["served"] == {"nll_loss": 4} and [left[:2] for left in result["left"]] == [("log_softmax", 4)]


def test_nudges_are_roundings():
    with clients.Calls():
        plain = train()
    with clients.Calls(torch.Generator().manual_seed(0)):
        nudged = train()
    assert not torch.equal(plain, nudged)
    torch.testing.assert_close(plain, nudged, rtol=1e-6, atol=0)
