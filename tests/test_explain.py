"""fastloss.explain against what really runs: operators called and bytes allocated, over every sample of every spec."""

import importlib
from unittest import mock

import fastloss
import pytest
import torch
import torch.distributed as dist
from fastloss._autograd import Path, choose
from fastloss.testing import SPECS
from ranks import Collectives
from test_contract import CASES as ALL
from test_contract import samples_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Without heads, whose operators are those of a chunk: test_heads below.
CASES = [case for case in ALL if case.values[0].name != "linear_cross_entropy"]
QUESTIONS = ("regime", "losses", "maps", "isa")  # operators that compute nothing


class Ran(TorchDispatchMode):
    """fastloss's operators that are called inside, and the bytes of the gradients that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.gradient_bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        package, name, _ = str(function).split(".")
        made = tree_leaves(results)
        shapes_alone = isinstance(made[0], torch.Tensor) and made[0].device.type == "meta"
        if package == "fastloss" and not name.endswith(QUESTIONS) and not shapes_alone:
            self.names.append(name)
            if "backward" in name:
                self.gradient_bytes += sum(t.nbytes for t in made)
            elif name.startswith("cross_entropy_forward"):  # loss, saved, gradient, statistics
                self.gradient_bytes += made[2].nbytes
            elif name in ("pointwise_plain_grad", "cross_entropy_plain_grad"):
                self.gradient_bytes += made[1].nbytes
            elif name == "divergence_grad":  # loss, gradients
                self.gradient_bytes += made[1].nbytes + made[2].nbytes
            elif name == "pointwise_forward":  # loss, factor, gradients
                self.gradient_bytes += sum(t.nbytes for t in made[2:])
        return results


def same_operators(got, want):
    return got == list(want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_what_is_said_is_what_happens(spec, i, dtype, device):
    sample = samples_of(spec, i, device, dtype)
    said = fastloss.explain(spec.function, *sample.args, **sample.kwargs)
    with Ran() as forward:
        loss = spec.function(*sample.args, **sample.kwargs)
    with Ran() as backward:
        loss.backward(torch.ones_like(loss) * 0.5)
    assert same_operators(forward.names, said.forward), said
    assert same_operators(backward.names, said.backward), said
    assert forward.gradient_bytes + backward.gradient_bytes == said.bytes_allocated, said
    assert said.handled_by == "fastloss" and said.kernel


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_without_a_gradient(spec, i, device):
    sample = samples_of(spec, i, device, torch.float32)
    with torch.no_grad():
        said = fastloss.explain(spec.function, *sample.args, **sample.kwargs)
        with Ran() as ran:
            spec.function(*sample.args, **sample.kwargs)
    assert same_operators(ran.names, said.forward) and said.backward == ()
    assert said.bytes_allocated == said.bytes_written == 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_nothing_is_computed(spec, device):
    sample = samples_of(spec, 0, device, torch.float32)
    with Ran() as ran:
        fastloss.explain(spec.function, *sample.args, **sample.kwargs)
    assert ran.names == []
    assert all(t.grad is None for t in sample.tensors())


def test_modules_and_the_form_without_a_loss(device):
    x = torch.randn(5, 7, device=device, requires_grad=True)
    t = torch.zeros(5, dtype=torch.long, device=device)
    assert fastloss.explain(fastloss.CrossEntropyLoss(), x, t) == fastloss.explain(x, t)
    assert fastloss.explain(fastloss.cross_entropy, x, t) == fastloss.explain(x, t)
    with pytest.raises(TypeError, match="loss or its input"):
        fastloss.explain("cross_entropy", x, t)
    with pytest.raises(ValueError, match="reduction"):
        fastloss.explain(fastloss.l1_loss, x, x, reduction="most")


def test_weights_of_probabilities_that_want_a_gradient(device):
    """They were said to be fused once; the call recomputes."""
    x = torch.randn(5, 7, device=device, requires_grad=True)
    w = torch.ones(7, device=device, requires_grad=True)
    said = fastloss.explain(x, x.detach().softmax(1), weight=w)
    assert "backward" in said.gradient and said.forward == ("cross_entropy_forward",)
    assert said.backward == ("cross_entropy_backward", "cross_entropy_target_backward")


HEADS = {
    "plain": {},
    "summed": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum"},
    "statistics": {"return_stats": True},
    "in backward": {"grad_in_forward": False},
    "probabilities": {"soft": True},
    "probabilities, each": {"soft": True, "reduction": "none"},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("gradient", (True, False))
def test_heads(options, gradient, device):
    """Operators of a chunk, as often as there are chunks; nothing is computed to say so."""
    options = dict(options)
    soft = options.pop("soft", False)
    x, w = (torch.randn(n, 6, device=device, requires_grad=gradient) for n in (10, 5))
    t = torch.rand(10, 5, device=device, requires_grad=gradient) if soft else torch.arange(10, device=device) % 5
    for chunks, more in ((1, {}), (5, {"memory_budget": 2 * 5 * 4})):
        with Ran() as ran:
            said = fastloss.explain(fastloss.linear_cross_entropy, x, w, t, **options, **more)
        assert ran.names == [] and said.handled_by == "fastloss"
        assert said.chunks == (chunks, 10 // chunks, 10 // chunks * 5 * 4)
        assert f"{chunks} of {10 // chunks} rows" in str(said)
        with Ran() as forward:
            loss = fastloss.linear_cross_entropy(x, w, t, **options, **more)
        loss = loss[0] if "return_stats" in options else loss
        assert forward.names == list(said.forward) * chunks, said
        if gradient:
            with Ran() as backward:
                loss.backward(torch.ones_like(loss) * 0.5)
            fused = "forward" in said.gradient.partition(",")[0]
            assert backward.names == list(said.backward) * (1 if fused else chunks), said
        else:
            assert said.backward == () and said.bytes_allocated == 0


class Products(TorchDispatchMode):
    """Matrix products, and the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.times, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.times += function._schema.name.partition("::")[2] in ("mm", "addmm")
        sizes = [t.nbytes for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return results


def own_head(loss, gradient, device):
    """A call of 10 rows, of which 6 count, and what a row of it takes."""
    x, w = (torch.randn(n, 6, device=device, requires_grad=gradient) for n in (10, 40))
    counts = torch.arange(10, device=device) < 6
    if loss == "linear_kl_divergence":
        teacher = torch.randn(10, 3, device=device), torch.randn(40, 3, device=device)
        return fastloss.linear_kl_divergence, (x, w, *teacher), {"mask": counts}, 6 * 40 * 4
    index = torch.where(counts, torch.arange(10, device=device), -100)
    return fastloss.linear_token_log_probs, (x, w, index), {"return_entropy": loss == "entropies"}, 2 * 40 * 4


@pytest.mark.parametrize("gradient", (True, False))
@pytest.mark.parametrize("loss", ("linear_kl_divergence", "linear_token_log_probs", "entropies"))
def test_heads_with_autograd_of_their_own(loss, gradient, device):
    """Operators of a chunk, products and bytes: rows that do not count are in no chunk on a CPU."""
    function, args, options, row = own_head(loss, gradient, device)
    rows = 6 if device == "cpu" and loss != "entropies" else 10
    for at_a_time in (10, 2):
        options["memory_budget"] = at_a_time * row
        with Ran() as ran:
            said = fastloss.explain(function, *args, **options)
        times, most = -(-rows // at_a_time), min(rows, at_a_time)
        assert ran.names == [] and said.chunks == (times, most, most * row)
        with Ran() as forward, Products() as products:
            results = function(*args, **options)
        assert forward.names == list(said.forward) * times
        assert products.times == times * (2 if loss == "linear_kl_divergence" else 1)
        assert max(most * 40 * 4, 6 * 40 * 4) >= products.largest >= most * 40 * 4
        if not gradient:
            assert said.gradient == Path.VALUE.value and said.backward == () and said.bytes_allocated == 0
            continue
        assert said.gradient == Path.RECOMPUTE.value and said.bytes_written == (10 + 40) * 6 * 4
        assert said.bytes_allocated == said.bytes_written + said.chunks.nbytes
        with Ran() as backward, Products() as products:
            sum(t.sum() for t in (results if isinstance(results, tuple) else (results,))).backward()
        assert backward.names == list(said.backward) * times
        assert products.times == times * (4 if loss == "linear_kl_divergence" else 3)
    with torch.autograd.forward_ad.dual_level():
        said = fastloss.explain(function, *args, **options)
        assert said.forward == said.backward == () and "torch's own" in said.gradient


@pytest.mark.parametrize("gradient", (True, False))
@pytest.mark.parametrize("entropy", (True, False))
def test_token_log_probs(entropy, gradient, device):
    x, index = torch.randn(3, 4, 40, device=device, requires_grad=gradient), torch.ones(3, 4, device=device).long()
    said = fastloss.explain(fastloss.token_log_probs, x, index, return_entropy=entropy)
    with Ran() as forward:
        results = fastloss.token_log_probs(x, index, return_entropy=entropy)
    assert forward.names == list(said.forward) and said.kernel and said.chunks is None
    assert said.bytes_written == said.bytes_allocated == (x.nbytes if gradient else 0)
    if gradient:
        with Ran() as backward:
            sum(t.sum() for t in (results if entropy else (results,))).backward()
        assert backward.names == list(said.backward) and backward.gradient_bytes == said.bytes_allocated
    else:
        assert said.backward == ()


SHARDED = {
    "indices": ("cross_entropy", {}),
    "no gradient": ("cross_entropy", {}),
    "each": ("cross_entropy", {"reduction": "none"}),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.1}),
    "statistics": ("cross_entropy", {"return_stats": True}),
    "probabilities": ("cross_entropy", {}),
    "probabilities and weights": ("cross_entropy", {}),
    "head": ("linear_cross_entropy", {}),
    "head, no gradient": ("linear_cross_entropy", {}),
    "head in chunks": ("linear_cross_entropy", {"memory_budget": 5 * 5 * 4}),
    "head, each": ("linear_cross_entropy", {"memory_budget": 5 * 5 * 4, "reduction": "none"}),
    "head, rows sharded": ("linear_cross_entropy", {"memory_budget": 4 * 5 * 4, "sequence_parallel": True}),
    "head, rows sharded, in pieces": ("linear_cross_entropy", {"memory_budget": 4 * 5 * 4, "sequence_parallel": True}),
    "tokens": ("token_log_probs", {}),
    "tokens and entropies": ("token_log_probs", {"return_entropy": True}),
    "tokens of a head": ("linear_token_log_probs", {"memory_budget": 5 * 5 * 4, "return_entropy": True}),
    "count": ("count", {}),
}
COLLECTIVES = {"allgather_base": "all_gather", "allreduce": "all_reduce", "reduce_scatter_base": "reduce_scatter"}


def sharded_call(rank, ranks, kind, gradient):
    """Of 12 rows and 5 classes for each rank."""
    g = torch.Generator().manual_seed(0)
    here, target = slice(5 * rank, 5 * rank + 5), torch.arange(12) % 5
    whole = torch.randn(12, 5 * ranks, generator=g)
    x, w = whole[:, here].clone().requires_grad_(gradient), torch.randn(5, 6, generator=g).requires_grad_(gradient)
    if kind == "count":
        return (target,), {}
    if "head" in kind:
        hidden = torch.randn(12, 6, generator=g)
        if "rows sharded" in kind:
            hidden = hidden[12 // ranks * rank : 12 // ranks * (rank + 1)].clone()
        return (hidden.requires_grad_(gradient), w, target), {}
    if "probabilities" in kind:
        weight = {"weight_shard": torch.ones(5).requires_grad_(gradient)} if "weights" in kind else {}
        return (x, whole.softmax(1)[:, here].clone().requires_grad_(gradient)), weight
    return (x, target), {}


def gathered(calls, when, said):
    """The collectives that ran and those that were said, by name: how often and how many bytes."""
    ran, told = {}, {}
    for name, nbytes in calls:
        times, so_far = ran.get(COLLECTIVES[name], (0, 0))
        ran[COLLECTIVES[name]] = times + 1, so_far + nbytes
    for c in said.collectives:
        if c.when == when:
            times, so_far = told.get(c.name, (0, 0))
            told[c.name] = times + c.times, so_far + c.nbytes
    return ran, told


def sharded(rank, group, kind):
    """What explain says on the first rank alone, and what then runs on all; returns what was sent in backward."""
    of_head = importlib.import_module("fastloss.parallel.linear_cross_entropy")
    with mock.patch.object(of_head, "_PIECE", 4 * 6 * 4 if "pieces" in kind else of_head._PIECE):
        return sharded_and_said(rank, group, kind)


def sharded_and_said(rank, group, kind):
    function, options = SHARDED[kind]
    loss, gradient = getattr(fastloss.parallel, function), "no gradient" not in kind and kind != "count"
    args, more = sharded_call(rank, dist.get_world_size(group), kind, gradient)
    options = {**options, **more}
    loss(*args, group, **options)  # what the ranks tell each other through the store
    if rank:
        said = None
    else:
        with Ran() as ran, Collectives() as sent:
            said = fastloss.explain(loss, *args, group, **options)
        assert ran.names == [] and sent.calls == [] and said.handled_by == "fastloss"
    with Ran() as forward, Collectives() as sent:
        results = loss(*args, group, **options)
    if said is None:
        if gradient:
            differentiate(results)
        return None
    ran, told = gathered(sent.calls, "forward", said)
    assert ran == told, (ran, told)
    chunks = 1 if said.chunks is None else said.chunks.times
    assert forward.names == list(said.forward) * chunks, (forward.names, said)
    assert chunks == (3 if "memory_budget" in options else 1), said
    if not gradient:
        assert said.backward == () and not any(c.when == "backward" for c in said.collectives)
        assert said.gradient == ("none" if kind == "count" else Path.VALUE.value)
        return {}
    with Ran() as backward, Collectives() as sent:
        differentiate(results)
    ran, told = gathered(sent.calls, "backward", said)
    assert ran == told, (ran, told)
    assert backward.names == list(said.backward) * chunks, (backward.names, said)
    leaves = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    assert said.bytes_written == sum(t.grad.nbytes for t in leaves), said
    return ran


def differentiate(results):
    """By all that has a gradient."""
    parts = results if isinstance(results, tuple) else (results,)
    sum(t.sum() for t in parts if isinstance(t, torch.Tensor)).backward()


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded(team, kind):
    """One rank asks alone; collectives, bytes and operators are then those that run."""
    sent = team.run(sharded, 2, kind)[0]
    assert bool(sent) == ("head" in kind and "no gradient" not in kind)


def test_bytes_of_a_row(team):
    assert team.run(row_bytes, 2)[0] == [("forward", "all_gather", 1, 12, 56 + 12 * 12)]


def row_bytes(rank, group):
    args, _ = sharded_call(rank, 2, "indices", True)
    return [tuple(c) for c in fastloss.explain(fastloss.parallel.cross_entropy, *args, group).collectives]


def dtensors(rank, group):
    """DTensors run the same functions, and explain says so; what would have to move first is refused."""
    mesh = DeviceMesh.from_group(group, "cpu")
    x = torch.randn(12, 5, requires_grad=True)
    target = torch.arange(12) % 5
    placed = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
    by_rows = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
    labels = DTensor.from_local(target, mesh, [Shard(0)], run_check=False)
    found = []
    for args in ((placed, target), (by_rows, labels)):
        with Collectives() as sent:
            said = fastloss.explain(fastloss.cross_entropy, *args)
        assert sent.calls == []
        with Ran() as forward, Collectives() as sent:
            fastloss.cross_entropy(*args)
        ran, told = gathered(sent.calls, "forward", said)
        assert forward.names == list(said.forward)
        found.append((ran, told))
    with pytest.raises(NotImplementedError, match="redistribute"):
        fastloss.explain(fastloss.cross_entropy, DTensor.from_local(x, mesh, [Partial()]), target)
    return found


def test_dtensors(team):
    for ran, told in team.run(dtensors, 2)[0]:
        assert ran == told and ran


def test_hooks_transforms_and_recorders(device):
    x, t = torch.randn(5, 7, device=device, requires_grad=True), torch.randn(5, 7, device=device)
    assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.FUSED.value
    with torch.autograd.graph.save_on_cpu():
        assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.RECOMPUTE.value
    with torch.autograd.forward_ad.dual_level():
        assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.FORWARD_MODE.value


def test_choose():
    """Over every combination of what it is told."""
    names = ("wanted", "transformed", "forward_mode", "fusable", "deferred", "in_forward", "in_place")
    paths = {}
    for bits in range(1 << len(names)):
        told = {name: bool(bits >> i & 1) for i, name in enumerate(names)}
        paths[choose(**told)] = paths.get(choose(**told), 0) + 1
        path = choose(**told)
        if path in (Path.FUSED, Path.IN_PLACE):
            assert told["wanted"] and told["fusable"] and not told["deferred"]
            assert not (told["transformed"] or told["forward_mode"])
        if path is Path.VALUE:
            assert not told["wanted"]
        if told["transformed"]:
            assert path is Path.TRANSFORMED
    assert set(paths) == set(Path)
