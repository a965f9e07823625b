"""lazy_head of tensor-parallel models, on gloo, against one process."""

import copy
import warnings

import fastloss
import pytest
import torch
import torch.nn.functional as F
from ranks import Collectives
from test_parallel import raised
from test_parallel_dtensor import mesh_of
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(torch.nn.Module):
    """A head with its loss, as models of languages have it."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = torch.nn.Linear(5, 6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, 11, bias=bias, dtype=torch.float64)

    def forward(self, x, labels):
        logits = self.head(self.body(x).tanh())
        logits = logits[:, :-1] * 0.5
        return F.cross_entropy(logits.reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=3)


def net_and_data(bias=True):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    return Net(bias), x, torch.randint(11, (3, 4), generator=g)


def whole_grads(net):
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters()]


def fused(rank, group, style, bias):
    """Loss and gradients of one process; the logits neither made nor gathered."""
    net, x, labels = net_and_data(bias)
    alone = copy.deepcopy(net)
    want = alone(x, labels)
    want.backward()
    parallelize_module(net, mesh_of(4), {"head": ColwiseParallel(**style)})
    fastloss.lazy_head(net, "head")
    with Collectives() as forward:
        loss = net(x, labels)
    report = fastloss.lazy_head.report(net)
    assert report.fused and report.losses == 1, report
    assert isinstance(loss, DTensor) is not style.get("use_local_output", True)
    loss.backward()
    torch.testing.assert_close(loss.full_tensor() if isinstance(loss, DTensor) else loss, want)
    for got, grad in zip(whole_grads(net), (p.grad for p in alone.parameters()), strict=True):
        torch.testing.assert_close(got, grad)
    # who looks gets the logits, in their placements
    with pytest.warns(fastloss.LazyHeadWarning):
        looked = net.head(net.body(x).tanh()).sin()
    looked = looked.full_tensor() if isinstance(looked, DTensor) else looked
    torch.testing.assert_close(looked, alone.head(alone.body(x).tanh()).sin())
    fastloss.restore_head(net)
    return forward.calls


styles = pytest.mark.parametrize(
    "style",
    (
        {"output_layouts": Shard(-1), "use_local_output": False},
        {"output_layouts": Replicate(), "use_local_output": False},
        {"output_layouts": Replicate()},
    ),
    ids=("sharded DTensor", "whole DTensor", "whole tensor"),
)


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@styles
def test_the_head_of_a_tensor_parallel_model(team, style, bias):
    for calls in team.run(fused, 4, style, bias):
        assert calls == [("allgather_base", 56 + 9 * 6 * 4)]  # statistics of 9 rows in float64


def tokens(rank, group, style, entropy):
    """Log-probabilities and their gradients of one process; the logits neither made nor gathered."""
    net, x, labels = net_and_data()
    alone = copy.deepcopy(net)

    def both(net):
        logits = net.head(net.body(x).tanh())[:, :-1] * 0.5
        given = {"temperature": 0.7, "return_entropy": entropy, "ignore_index": 3}
        found = fastloss.token_log_probs(logits, labels[:, 1:], **given)
        return found if entropy else (found,)

    want = both(alone)
    sum((t * (1 + i)).square().sum() for i, t in enumerate(want)).backward()
    parallelize_module(net, mesh_of(4), {"head": ColwiseParallel(**style)})
    fastloss.lazy_head(net, "head")
    with Collectives() as forward:
        found = both(net)
    report = fastloss.lazy_head.report(net)
    assert report.fused and not report.made, report
    assert all(isinstance(t, DTensor) is not style.get("use_local_output", True) for t in found)
    found = [t.full_tensor() if isinstance(t, DTensor) else t for t in found]
    torch.testing.assert_close(found, list(want))
    sum((t * (1 + i)).square().sum() for i, t in enumerate(found)).backward()
    for got, grad in zip(whole_grads(net), (p.grad for p in alone.parameters()), strict=True):
        torch.testing.assert_close(got, grad)
    return forward.calls


@pytest.mark.parametrize("entropy", (False, True), ids=("", "entropy"))
@styles
def test_log_probabilities_of_a_tensor_parallel_model(team, style, entropy):
    for calls in team.run(tokens, 4, style, entropy):
        assert calls == [("allgather_base", 56 + 9 * (6 if entropy else 3) * 8)]


def by_hand(rank, group):
    """Log-probabilities as users write them, of a head that hands out all logits as a plain tensor."""
    found = []
    for fused in (True, False):
        net, x, labels = net_and_data()
        alone = copy.deepcopy(net)

        def loss(net, fused=fused, x=x, labels=labels):
            z, at = net.head(net.body(x).tanh()), labels.unsqueeze(-1)
            log_probs = z.log_softmax(-1).gather(-1, at) if fused else z.gather(-1, at) - z.logsumexp(-1, keepdim=True)
            return log_probs.square().sum()

        want = loss(alone)
        want.backward()
        parallelize_module(net, mesh_of(4), {"head": ColwiseParallel(output_layouts=Replicate())})
        fastloss.lazy_head(net, "head")
        with warnings.catch_warnings():
            warnings.simplefilter("error" if fused else "ignore")
            got = loss(net)
        torch.testing.assert_close(got, want)
        got.backward()
        for grad, other in zip(whole_grads(net), (p.grad for p in alone.parameters()), strict=True):
            torch.testing.assert_close(grad, other)
        found.append(fastloss.lazy_head.report(net).fused)
    return found


def test_log_probabilities_by_hand(team):
    """Of log_softmax as token_log_probs; a difference of gather and logsumexp has the logits made."""
    assert team.run(by_hand, 4) == [[True, False]] * 4


def refused(rank, group):
    """What cannot be fused says so, and the model is as before."""
    found = []
    for style in (ColwiseParallel(), RowwiseParallel()):
        net, _, _ = net_and_data(False)
        parallelize_module(net, mesh_of(4), {"head": style})
        before = dict(net.head.__dict__)
        found.append(raised(fastloss.lazy_head, net, "head"))
        assert net.head.__dict__.keys() == before.keys()
    return found


def test_other_layouts_are_refused_at_once(team):
    for found in team.run(refused, 4):
        for (kind, message), words in zip(found, ("use_local_output=False", "ColwiseParallel"), strict=True):
            assert kind is NotImplementedError and words in message and "left as it is" in message, message
