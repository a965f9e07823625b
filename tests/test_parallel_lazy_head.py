"""lazy_head of tensor-parallel models, on gloo, against one process."""

import copy

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


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize(
    "style",
    (
        {"output_layouts": Shard(-1), "use_local_output": False},
        {"output_layouts": Replicate(), "use_local_output": False},
        {"output_layouts": Replicate()},
    ),
    ids=("sharded DTensor", "whole DTensor", "whole tensor"),
)
def test_the_head_of_a_tensor_parallel_model(team, style, bias):
    for calls in team.run(fused, 4, style, bias):
        assert calls == [("allgather_base", 56 + 9 * 6 * 4)]  # statistics of 9 rows in float64


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
