"""fastloss.cross_entropy of DTensors, on gloo with 4 processes and a mesh of 2 x 2, against the whole."""

import contextlib
import functools
import importlib.util
import itertools
import warnings
from pathlib import Path

import fastloss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Collectives
from test_parallel import OPTIONS, problem, raised, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

R = Replicate()
NAMES = ("data", "classes")


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=NAMES[-len(shape) :])


def of_rows(placements, class_dim):
    """Placements of what has one element for each row."""
    found = []
    for p in placements:
        rows = isinstance(p, Shard) and p.dim != class_dim
        found.append(Shard(p.dim - (p.dim > class_dim)) if rows else R)
    return found


def compare(rank, mesh, placements, shape, dtype, soft, options, plain, seed=0, class_dim=1):
    """One call against one process. ``plain``: targets and weights are plain tensors of the whole."""
    mesh = mesh_of(*mesh)
    x, target, options = problem(seed, shape, dtype, soft, options)
    want, grads = whole(x, target, options, ones=True)
    if class_dim == -1:
        x, grads = x.movedim(1, -1).contiguous(), [g.movedim(1, -1) if g.dim() > 1 else g for g in grads]
        target = target.movedim(1, -1) if soft else target
        options["class_dim"] = -1
    at = class_dim % len(shape)
    logits = distribute_tensor(x, mesh, placements).requires_grad_()
    if not plain:
        options = {
            k: distribute_tensor(v, mesh, of_rows(placements, at) if k == "sample_weight" else [R] * mesh.ndim)
            if isinstance(v, torch.Tensor)
            else v
            for k, v in options.items()
        }
        target = distribute_tensor(target, mesh, placements if soft else of_rows(placements, at))
        if soft:
            target.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fastloss.cross_entropy(logits, target, **options)
    loss = result[0] if options.get("return_stats") else result
    want_loss = want[0] if options.get("return_stats") else want
    eps = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2.5e-2}[dtype]

    def check(got, want, what):
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=eps,
            atol=eps * max(want.abs().max().item(), 1e-30),
            msg=lambda m: f"{what}: {m}",
        )

    assert isinstance(loss, DTensor)
    check(loss.full_tensor(), want_loss, "loss")
    loss.sum().backward()
    assert logits.grad.placements == logits.placements
    check(logits.grad.full_tensor(), grads[0], "gradient by logits")
    if soft and not plain:
        check(target.grad.full_tensor(), grads[1], "gradient by target")
    if options.get("return_stats"):
        for name in ("lse", "argmax", "accuracy", "entropy"):
            check(getattr(result[1], name).full_tensor(), getattr(want[1], name), name)


def compare_many(rank, group, cases):
    for case in cases:
        try:
            compare(rank, **case)
        except Exception as e:
            raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e


PLACEMENTS = (
    ((4,), [Shard(1)]),
    ((4,), [Shard(0)]),
    ((4,), [R]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [R, Shard(1)]),
    ((2, 2), [Shard(0), R]),
    ((2, 2), [Shard(0), Shard(0)]),
)


@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
def test_any_mesh_gives_the_whole(team, soft):
    """Sizes that the mesh does not divide, and more ranks than rows, too."""
    cases, turn = [], itertools.cycle((torch.float64, torch.float32, torch.bfloat16))
    options = [{k: v for k, v in o.items() if not soft or k != "ignore_index"} for o in OPTIONS.values()]
    for seed, (each, (mesh, placements)) in enumerate(itertools.product(options, PLACEMENTS)):
        shape = ((5, 11), (3, 6), (6, 13))[seed % 3]
        case = {"mesh": mesh, "placements": placements, "shape": shape, "dtype": next(turn), "soft": soft}
        cases.append(case | {"options": each, "plain": seed % 2 == 0, "seed": seed})
    for placements in ([Shard(2), Shard(1)], [Shard(0), Shard(1)], [Shard(3), Shard(2)]):
        case = {"mesh": (2, 2), "placements": placements, "shape": (3, 7, 5, 2), "dtype": torch.float64, "soft": soft}
        cases.append(case | {"options": OPTIONS["smoothing and weights"], "plain": False})
    for placements in ([Shard(0), Shard(2)], [Shard(1), Shard(2)], [R, Shard(2)]):
        case = {"mesh": (2, 2), "placements": placements, "shape": (3, 7, 5), "dtype": torch.float64, "soft": soft}
        cases.append(case | {"options": OPTIONS["statistics"], "plain": True, "class_dim": -1})
    team.run(compare_many, 4, cases)


def redistributed(rank, group):
    """One warning, which names the placements; then the right result."""
    mesh = mesh_of(2, 2)
    x, target, _ = problem(3, (5, 8), torch.float64)
    want = fastloss.cross_entropy(x, target)
    for placements in ([Shard(1), Shard(1)], [Partial(), Shard(1)]):
        logits = distribute_tensor(x, mesh, [R, Shard(1)])
        if isinstance(placements[0], Partial):
            logits = DTensor.from_local(logits.to_local() / 2, mesh, placements, run_check=False)
        else:
            logits = logits.redistribute(placements=placements)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = fastloss.cross_entropy(logits, target)
        said = [w for w in caught if "redistributed" in str(w.message)]
        assert len(said) == 1 and str(tuple(placements)) in str(said[0].message)
        assert said[0].filename == __file__
        torch.testing.assert_close(loss.full_tensor(), want)


def test_other_placements_are_redistributed_with_a_warning(team):
    team.run(redistributed, 4)


def compiled(rank, group):
    """Losses of DTensors are a break in a graph, or raise, and say why."""
    mesh, (x, target, _) = mesh_of(2, 2), problem(3, (5, 8), torch.float64)
    logits = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    for function, want in (
        (fastloss.cross_entropy, fastloss.cross_entropy(x, target)),
        (lambda z, t: fastloss.token_log_probs(z, t.clamp(min=0)), fastloss.token_log_probs(x, target.clamp(min=0))),
    ):
        got = torch.compile(lambda z, t, f=function: f(z * 1, t), backend="aot_eager")(logits, target)
        torch.testing.assert_close(got.full_tensor(), want)
    return raised(torch.compile(fastloss.cross_entropy, backend="eager", fullgraph=True), logits, target)


def test_dtensors_break_graphs(team):
    for _, message in team.run(compiled, 4):
        assert "losses of DTensors run outside of graphs" in message, message


def collectives(rank, group, placements, options):
    mesh = mesh_of(2, 2)
    x, target, options = problem(1, (8, 10), torch.float32, False, options)
    if options.pop("shard", False):
        options["weight"] = distribute_tensor(options["weight"], mesh, [R, Shard(0)])
    logits, labels = distribute_tensor(x, mesh, placements), target
    logits.requires_grad_()
    with Collectives() as forward:
        loss = fastloss.cross_entropy(logits, labels, **options)
    with Collectives() as backward:
        loss.backward()
    return [n for _, n in forward.calls], backward.calls


def test_what_travels(team):
    """Over the classes the statistics of this rank's rows; over the rows one number for the mean, one for the sum."""
    for forward, backward in team.run(collectives, 4, [Shard(0), Shard(1)], {}):
        assert sorted(forward) == sorted([8, 56 + 4 * 12, 4, 4]) and backward == []
    for forward, backward in team.run(collectives, 4, [Shard(0), Shard(1)], {"weight": True, "shard": True}):
        # of the denominators over the classes and the rows; the weights of targets travel with the statistics
        assert sorted(forward) == sorted([8, 16, 56 + 4 * 16, 4, 4]) and backward == []
    for forward, backward in team.run(collectives, 4, [R, Shard(1)], {"reduction": "sum"}):
        assert forward == [56 + 8 * 12] and backward == []


def patched(rank, group):
    """torch's own names, within patch() and loss_parallel(), as torchtitan calls them."""
    mesh, weight = mesh_of(4), torch.rand(10, generator=torch.Generator().manual_seed(2))
    x, target, _ = problem(2, (2, 3, 10), torch.float32)
    target = torch.randint(10, (2, 3), generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    want = F.cross_entropy(leaf.flatten(0, 1).float(), target.flatten(0, 1), weight=weight)
    want.backward()
    logits = distribute_tensor(x, mesh, [Shard(2)]).requires_grad_()
    with fastloss.patch(), loss_parallel():
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(0, 1), weight=weight)
        loss.backward()
        report = fastloss.patch_report()
    assert report.served == {"cross_entropy": 1} and not report.declined
    torch.testing.assert_close(loss.full_tensor(), want)
    torch.testing.assert_close(logits.grad.full_tensor(), leaf.grad)
    with fastloss.patch():  # a loss that does not know DTensors is torch's
        F.mse_loss(logits, logits.detach())
        assert "DTensor" in str(fastloss.patch_report())
    loss = fastloss.focal_loss(distribute_tensor(x[0], mesh, [Shard(1)]), target[0], gamma=1.5)
    torch.testing.assert_close(loss.full_tensor(), fastloss.focal_loss(x[0], target[0], gamma=1.5))


def test_patch_and_loss_parallel(team):
    team.run(patched, 4)


def accuracy(rank, group):
    """5 of 11 targets are the largest logit, all of them in the 6 rows of the first half: the share has its digits."""
    target = torch.arange(11) % 2
    logits = F.one_hot(torch.where(torch.arange(11) < 5, target, 1 - target), 2).float()
    found = fastloss.cross_entropy(
        distribute_tensor(logits, mesh_of(2, 2), [Shard(0), Shard(1)]), target, return_stats=True
    )
    assert torch.equal(
        found[1].accuracy.full_tensor(), fastloss.cross_entropy(logits, target, return_stats=True)[1].accuracy
    )


def test_the_accuracy_of_all_rows(team):
    team.run(accuracy, 4)


def sharded_weights(rank, group):
    """Class weights sharded like the classes, replicated and plain, with their gradient for probabilities."""
    mesh = mesh_of(2, 2)
    for placements in ([Shard(0), Shard(1)], [R, Shard(1)], [Shard(0), R]):
        for soft in (False, True):
            x, target, options = problem(6, (5, 9), torch.float64, soft, {"weight": True, "z_loss": 0.1})
            want, grads = whole(x, target, options, ones=True)
            logits = distribute_tensor(x, mesh, placements).requires_grad_()
            for weight in (
                distribute_tensor(options["weight"], mesh, [R, Shard(0)]),
                distribute_tensor(options["weight"], mesh, [R, R]),
                options["weight"].clone(),
            ):
                weight.requires_grad_(soft)
                loss = fastloss.cross_entropy(logits, target, weight=weight, z_loss=0.1)
                (grad, *others) = torch.autograd.grad(loss, [logits, weight] if soft else [logits])
                torch.testing.assert_close(loss.full_tensor(), want)
                torch.testing.assert_close(grad.full_tensor(), grads[0])
                for by_weight in others:
                    by_weight = by_weight.full_tensor() if isinstance(by_weight, DTensor) else by_weight
                    torch.testing.assert_close(by_weight, grads[2])
            if not soft:  # nothing counts
                nothing = {"weight": options["weight"], "z_loss": 0.1, "all_ignored": "zero"}
                loss = fastloss.cross_entropy(logits, torch.full((5,), -100), **nothing)
                assert loss.full_tensor() == 0 and not torch.autograd.grad(loss, logits)[0].full_tensor().any()


def test_sharded_class_weights(team):
    team.run(sharded_weights, 4)


def linear(rank, group, soft):
    """linear_cross_entropy with a DTensor as its weight: classes over one axis, rows over the other, or neither."""
    mesh, dtype = mesh_of(2, 2), torch.float64
    g = torch.Generator().manual_seed(3)
    cases = (
        ([R, Shard(0)], [R, R], True),
        ([R, Shard(0)], [Shard(0), R], False),
        ([Shard(0), R], [R, Shard(0)], False),
        ([R, R], [Shard(0), R], False),
        ([R, Shard(0)], [Shard(0), Shard(0)], False),  # rows over the axis of the classes are gathered
    )
    for (seed, (of_weight, of_input, plain)), options in itertools.product(
        enumerate(cases), ({}, OPTIONS["rows"], OPTIONS["everything"], OPTIONS["statistics"])
    ):
        x, w, b = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((7, 5), (9, 5), (9,)))
        _, target, options = problem(seed, (7, 9), dtype, soft, options)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        want = fastloss.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options)
        mine = [distribute_tensor(t, mesh, p) for t, p in zip((x, w, b), (of_input, of_weight, of_weight), strict=True)]
        if plain:
            mine[0] = x.clone()
        for leaf in mine:
            leaf.requires_grad_()
        got = fastloss.linear_cross_entropy(*mine[:2], target, linear_bias=mine[2], memory_budget=300, **options)
        if options.get("return_stats"):
            for name in ("lse", "accuracy"):
                torch.testing.assert_close(getattr(got[1], name).full_tensor(), getattr(want[1], name))
            got, want = got[0], want[0]
        torch.testing.assert_close(got.full_tensor(), want)
        grads = torch.autograd.grad(want.sum(), leaves)
        for a, c in zip(torch.autograd.grad(got.sum(), mine), grads, strict=True):
            torch.testing.assert_close(a.full_tensor() if isinstance(a, DTensor) else a, c)


@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
def test_a_head_that_is_a_dtensor(team, soft):
    team.run(linear, 4, soft)


def tokens(rank, group):
    """token_log_probs and its linear form: classes over one axis, rows over the other, or neither."""
    mesh, g = mesh_of(2, 2), torch.Generator().manual_seed(4)
    hidden, head, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 5, 4), (7, 4), (7,)))
    index = torch.randint(7, (3, 5), generator=g)
    index[1, 2] = -100
    given = {"temperature": 0.8, "softcap": 3.0, "return_entropy": True}

    def compare(function, whole, placements, plain):
        leaves = [t.clone().requires_grad_() for t in whole]
        want = function(*leaves)
        mine = [distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(whole, placements, strict=True)]
        found = function(*mine, index=index if plain else distribute_tensor(index, mesh, [R, R]))
        assert all(isinstance(t, DTensor) and t.placements == found[0].placements for t in found)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
        losses = [t[0].square().sum() + t[1].sum() for t in (found, want)]
        for a, b in zip(torch.autograd.grad(losses[0], mine), torch.autograd.grad(losses[1], leaves), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)

    def of_logits(z, index=index):
        return fastloss.token_log_probs(z, index, **given)

    def of_head(x, w, b, index=index):
        return fastloss.linear_token_log_probs(x, w, index, bias=b, memory_budget=200, **given)

    for seed, placements in enumerate(
        ([Shard(0), Shard(2)], [Shard(2), Shard(1)], [R, Shard(2)], [Shard(0), Shard(1)])
    ):
        compare(of_logits, [torch.nn.functional.linear(hidden, head, bias)], [placements], seed % 2 == 0)
    for of_input, of_head_ in (([Shard(0), R], [R, Shard(0)]), ([R, Shard(1)], [Shard(0), R]), ([Shard(0), R], [R, R])):
        compare(of_head, [hidden, head, bias], [of_input, of_head_, of_head_], False)


def test_log_probabilities_of_dtensors(team):
    team.run(tokens, 4)


@functools.cache
def example():
    path = Path(__file__).resolve().parent.parent / "examples" / "tensor_parallel.py"
    spec = importlib.util.spec_from_file_location("tensor_parallel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(rank, group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    device = torch.device("cpu")
    return example().train(5, device, mesh), example().train(5, device) if rank == 0 else None


def test_the_example_trains_to_the_curve_of_one_process(team):
    """Tensor parallelism of 2, FSDP2 over 2, two micro-batches with different numbers of targets."""
    found = team.run(trained, 4)
    alone = found[0][1]
    assert alone[3] < alone[0] - 0.5  # it learns
    for curve, _ in found:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(alone), rtol=1e-4, atol=1e-4)


class Titan(torch.nn.Module):
    """As torchtitan's decoders end, with an embedding."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings, self.layer = torch.nn.Embedding(21, 8), torch.nn.Linear(8, 8)
        self.norm, self.output = torch.nn.RMSNorm(8), torch.nn.Linear(8, 21, bias=False)

    def forward(self, tokens):
        return self.output(self.norm(self.layer(self.tok_embeddings(tokens)).tanh()))


def titans(rank, group):
    """torchtitan's plan and loss: sequence parallelism, FSDP2, loss_parallel(), the sum divided by all targets."""
    mesh, curves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), []
    g = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(21, (4, 6), generator=g) for _ in range(2))
    labels[0, 2:] = labels[3, 0] = -100
    for sharded in (True, False):
        torch.manual_seed(0)
        model, data, here = Titan(), mesh["dp"], slice(None)
        if sharded:
            plan = {
                "tok_embeddings": RowwiseParallel(input_layouts=R, output_layouts=Shard(1)),
                "layer": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
            }
            fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=data)
            here = slice(data.get_local_rank(), None, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for _ in range(4):
            with fastloss.patch() if sharded else contextlib.nullcontext(), loss_parallel():
                logits = model(tokens[here]).flatten(0, 1).float()
                loss = F.cross_entropy(logits, labels[here].flatten(0, 1), reduction="sum") / (labels != -100).sum()
                assert not sharded or fastloss.patch_report().served["cross_entropy"] == 1
                ((2 if sharded else 1) * loss).backward()  # FSDP averages
            total = loss.detach()
            if sharded:
                total = total.full_tensor().clone()
                dist.all_reduce(total, group=data.get_group())
            optimizer.step()
            optimizer.zero_grad()
            curves.append(total)
    torch.testing.assert_close(curves[:4], curves[4:])
    assert curves[3] < curves[0] - 0.2  # it learns


def test_a_module_as_torchtitans_trains_to_the_curve_of_one_process(team):
    team.run(titans, 4)


def errors(rank, group):
    mesh, x = mesh_of(2, 2), torch.zeros(4, 6)
    logits = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    target = torch.zeros(4, dtype=torch.long)
    found = [
        raised(fastloss.cross_entropy, logits, target[:2]),
        raised(fastloss.cross_entropy, x, distribute_tensor(target, mesh, [R, R])),
        raised(fastloss.cross_entropy, logits, target, inplace_grad=True),
        raised(fastloss.cross_entropy, logits, distribute_tensor(target, mesh_of(4), [R])),
        raised(fastloss.mse_loss, logits, logits),
        raised(fastloss.parallel.cross_entropy, logits, target),
    ]
    hidden, head = torch.zeros(4, 3), distribute_tensor(torch.zeros(6, 3), mesh, [R, Shard(0)])
    found += [
        raised(fastloss.linear_cross_entropy, distribute_tensor(hidden, mesh, [R, R]), torch.zeros(6, 3), target),
        raised(fastloss.token_log_probs, x, distribute_tensor(target, mesh, [R, R])),
        raised(fastloss.linear_cross_entropy, hidden, head, target, max_rows=3),
        raised(fastloss.linear_cross_entropy, hidden, head, target[:2]),
    ]
    bad = target.clone()
    bad[3] = 6  # of the second half of the rows: the others are told
    for placements in ([Shard(0), Shard(1)], [Shard(0), R]):
        logits = distribute_tensor(x, mesh, placements)
        found.append(raised(fastloss.cross_entropy, logits, bad))
        found.append(raised(fastloss.cross_entropy, logits, bad, reduction="none"))
        found.append(raised(fastloss.token_log_probs, logits, bad))
        linear = (
            distribute_tensor(hidden, mesh, [Shard(0), R]),
            distribute_tensor(x[:, :3], mesh, [R, Shard(0) if placements[1] == Shard(1) else R]),
        )
        found.append(raised(fastloss.linear_token_log_probs, *linear, bad))
    assert fastloss.cross_entropy(logits, target).full_tensor().isfinite()
    return found


def test_errors(team):
    wants = (
        (ValueError, "DTensor.from_local(target"),
        (NotImplementedError, "input is not"),
        (ValueError, "inplace_grad"),
        (ValueError, "another device mesh"),
        (NotImplementedError, "to_local"),
        (NotImplementedError, "to_local"),
        (NotImplementedError, "the weight is not"),
        (NotImplementedError, "logits are not"),
        (NotImplementedError, "max_rows"),
        (ValueError, "DTensor.from_local(target"),
    )
    for rank, found in enumerate(team.run(errors, 4)):
        for (kind, message), (want, words) in zip(found, wants, strict=False):
            assert kind is want and words in message, (kind, message)
        assert len(found) == len(wants) + 8
        for kind, message in found[-8:]:
            assert kind is IndexError, message
            assert rank >= 2 or "another rank of the mesh was given a bad target" in message, message
