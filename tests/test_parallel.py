"""Classes sharded over ranks (fastloss.parallel), on gloo with 2, 3 and 4 processes, against the whole."""

import contextlib
import datetime
import itertools
import os
import random
import re
import shutil
import time
import unittest.mock
import warnings

import fastloss
import pytest
import torch
import torch.distributed as dist
from fastloss import parallel
from fastloss.parallel import _exchange
from ranks import Collectives, Team, alone

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


# ------------------------------------------------------------------------------------------------------------ problems


def cuts(classes, ranks, seed, kind="uneven"):
    """The ends of each rank's classes."""
    rng = random.Random(seed)
    if kind == "equal":
        return [classes * r // ranks for r in range(ranks + 1)]
    if kind == "empty":  # a rank has none
        inner = sorted(rng.randint(0, classes) for _ in range(ranks - 2))
        return sorted([0, rng.choice([0, *inner]), *inner, classes])
    return [0, *sorted(rng.randint(0, classes) for _ in range(ranks - 1)), classes]


def problem(seed, shape, dtype, soft=False, options=None):
    """Logits, target, and the options with their tensors, the same on every rank."""
    g = torch.Generator().manual_seed(seed)
    classes, rows = shape[1], (shape[0], *shape[2:])
    x = (3 * torch.randn(shape, generator=g)).to(dtype)
    target = torch.randn(shape, generator=g).softmax(1).to(dtype) if soft else torch.randint(classes, rows, generator=g)
    options = dict(options or {})
    if not soft:
        target[torch.rand(rows, generator=g) < 0.2] = options.get("ignore_index", -100)
        target.view(-1)[0] = 0
    for name, size in (("weight", (classes,)), ("sample_weight", rows)):
        if options.get(name) is True:
            options[name] = (torch.rand(size, generator=g) + 0.5).to(dtype if dtype is torch.float64 else torch.float32)
    return x, target, options


def whole(x, target, options, row_map="none", map_params=(), ones=False):
    """Loss (and statistics) and gradients in float64, of one process; of rows times 1, 2, ... but for ``ones``."""
    x = x.to(torch.float64, copy=True).requires_grad_()
    options = {k: v.to(torch.float64, copy=True) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaves = [x]
    if target.is_floating_point():
        target = target.to(torch.float64, copy=True).requires_grad_()
        leaves.append(target)
        if "weight" in options:
            leaves.append(options["weight"].requires_grad_())
    if row_map == "focal":
        result = fastloss.focal_loss(x, target, *map_params, **options)
    else:
        result = fastloss.cross_entropy(x, target, **options)
    loss = result[0] if isinstance(result, tuple) else result
    g = torch.ones_like(loss) if ones else 1 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape)
    return result, torch.autograd.grad(loss, leaves, g)


def close(got, want, dtype, what):
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    eps = TOLERANCE[dtype]
    atol = eps * scale + (2.0**-23 if dtype is torch.float16 else 0)
    torch.testing.assert_close(
        got.double(), want.double(), rtol=eps, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def same_bits(group, *tensors):
    """Whether all ranks hold the same."""
    for t in tensors:
        bits = t.detach().contiguous().reshape(-1).view(torch.uint8)
        everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, bits, group=group)
        assert all(torch.equal(bits, other) for other in everyone)


def compare(rank, group, seed, shape, dtype, kind, soft, options, weights="whole", layout="contiguous", **extra):
    """One call against one process, with every gradient."""
    ranks = dist.get_world_size(group)
    x, target, options = problem(seed, shape, dtype, soft, options)
    (want, grads) = whole(x, target, options, **extra)
    ends = cuts(shape[1], ranks, seed, kind)
    here = slice(ends[rank], ends[rank + 1])
    shard = x[:, here].clone()
    if layout == "classes last":
        shard = shard.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        shard = shard.repeat_interleave(2, 0)[::2]
    shard.requires_grad_()
    leaves = [shard]
    if soft:
        target = target[:, here].clone().requires_grad_()
        leaves.append(target)
    if "weight" in options and weights == "shard":
        options["weight_shard"] = options.pop("weight")[here].clone()
        if soft:
            leaves.append(options["weight_shard"].requires_grad_())
    result = parallel.cross_entropy(shard, target, group, **options, **extra)
    loss, want_loss = (r[0] if options.get("return_stats") else r for r in (result, want))
    accum = torch.float64 if dtype is torch.float64 else torch.float32
    close(loss, want_loss, dtype, "loss")
    g = 1 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape)
    found = torch.autograd.grad(loss, leaves, g)
    for got, leaf, grad, name in zip(found, leaves, grads, ("logits", "target", "weight"), strict=False):
        want_grad = grad[here] if name == "weight" else grad[:, here]
        assert got.shape == leaf.shape and got.dtype == leaf.dtype
        # the scale is the whole's: a shard may hold nothing but what is small
        scaled = torch.cat([got.double().flatten(), grad.abs().max().view(1)])
        close(scaled, torch.cat([want_grad.flatten(), grad.abs().max().view(1)]), dtype, f"gradient by {name}")
    same_bits(group, loss)
    if options.get("return_stats"):
        for name in ("lse", "entropy", "accuracy"):
            close(getattr(result[1], name), getattr(want[1], name), accum if accum is dtype else torch.float16, name)
        assert torch.equal(result[1].argmax, want[1].argmax)
        same_bits(group, *result[1])
    return [ends, loss.dtype]


def compare_many(rank, group, cases):
    for case in cases:
        case = dict(case)
        try:
            compare(rank, group, **case)
        except Exception as e:
            raise AssertionError(f"{case}: {e}") from e
    return len(cases)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none", "z_loss": 0.01, "weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing and weights": {"label_smoothing": 0.2, "weight": True},
    "weighted": {"weight": True, "sample_weight": True, "ignore_index": 1, "logit_scale": -0.7},
    "capped": {"softcap": 3.0, "logit_scale": 0.7, "normalizer": 11.5},
    "everything": {
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "zero_times_inf": "zero",
    },
    "statistics": {"return_stats": True},
    "statistics with everything": {"return_stats": True, "label_smoothing": 0.1, "softcap": 4.0, "weight": True},
}
SHAPES = ((7, 40), (3, 11, 2, 3), (1, 300), (5, 6))


@pytest.mark.parametrize("ranks", (2, 3, 4))
@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
def test_shards_give_the_whole(team, ranks, soft):
    """Every option, in every dtype, for shards of any sizes: the loss of one process and its gradients."""
    cases, kinds = [], itertools.cycle(("uneven", "equal", "empty"))
    layouts = itertools.cycle(("contiguous", "classes last", "sliced"))
    for seed, (name, options) in enumerate(OPTIONS.items()):
        if soft:
            options = {k: v for k, v in options.items() if k != "ignore_index"}
        for dtype in TOLERANCE:
            for weights in ("whole", "shard") if "weight" in options else ("whole",):
                kind = next(kinds)
                shape = SHAPES[(seed + len(cases)) % len(SHAPES)]
                case = {"seed": 10 * seed + ranks, "shape": shape, "dtype": dtype, "kind": kind, "soft": soft}
                cases.append(case | {"options": options, "weights": weights, "layout": next(layouts)})
        assert name
    assert team.run(compare_many, ranks, cases) == [len(cases)] * ranks


def test_focal_loss_is_a_row_map(team):
    cases = [
        {
            "seed": seed,
            "shape": (6, 31),
            "dtype": dtype,
            "kind": "uneven",
            "soft": soft,
            "options": {"weight": True, "label_smoothing": smoothing},
            "weights": "shard",
            "row_map": "focal",
            "map_params": (1.5,),
        }
        for seed, (dtype, soft, smoothing) in enumerate(
            itertools.product((torch.float64, torch.float32), (False, True), (0.0, 0.1))
        )
    ]
    team.run(compare_many, 3, cases)


def special(rank, group):
    """A single row; 16-bit options; class_dim; nothing that counts; rows that are not finite."""
    ranks, inf, nan = dist.get_world_size(group), float("inf"), float("nan")
    ends = cuts(12, ranks, 3)
    here = slice(ends[rank], ends[rank + 1])
    x = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor(5)
    got = parallel.cross_entropy(x[here], target, group, reduction="none", return_stats=True)
    want = fastloss.cross_entropy(x, target, reduction="none", return_stats=True)
    torch.testing.assert_close(got[0], want[0])
    assert got[1].argmax.shape == want[1].argmax.shape == () and got[1].argmax == want[1].argmax

    x = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    target = torch.randint(12, (4, 3), generator=torch.Generator().manual_seed(2))
    for options in ({"class_dim": -1}, {"class_dim": 2, "loss_dtype": torch.float32}):
        got = parallel.cross_entropy(x[..., here], target, group, **options)
        want = fastloss.cross_entropy(x, target, **options)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parallel.cross_entropy(x[..., here], target, group, class_dim=-1).dtype is torch.float32

    shard = x[..., here].movedim(-1, 1).clone().requires_grad_()
    nothing = torch.full((4, 3), -100)
    for all_ignored, value in (("nan", nan), ("zero", 0.0)):
        loss = parallel.cross_entropy(shard, nothing, group, all_ignored=all_ignored)
        torch.testing.assert_close(loss.float(), torch.tensor(value), equal_nan=True)
        (grad,) = torch.autograd.grad(loss, shard)
        assert (grad == 0).all()
        got = parallel.cross_entropy(shard, nothing, group, all_ignored=all_ignored, return_stats=True)
        torch.testing.assert_close(got[1].accuracy, torch.tensor(value), equal_nan=True)
    assert parallel.cross_entropy(shard, nothing, group, ignore_index=[3, -100], normalizer=2).item() == 0

    x = torch.tensor([[-inf, -inf, 1, 2], [-inf] * 4, [0, nan, 1, 2], [0, inf, 1, 2], [inf, 0, 1, -inf]])
    target = torch.tensor([3, 0, 3, 0, 2])
    ends = cuts(4, ranks, 1, "equal")
    shard = x[:, ends[rank] : ends[rank + 1]].clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    got, stats = parallel.cross_entropy(shard, target, group, reduction="none", return_stats=True)
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(stats.lse, x.logsumexp(1), equal_nan=True)

    # One class of one rank has the probability of all: nothing of it is lost.
    x = torch.zeros(2, 4 * ranks)
    x[:, -1] = 1e4
    shard = x[:, 4 * rank : 4 * rank + 4].half().requires_grad_()
    parallel.cross_entropy(shard, torch.tensor([0, 4 * ranks - 1]), group, reduction="sum").backward()
    assert shard.grad.isfinite().all()

    rows, nothing = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long)
    assert parallel.cross_entropy(rows, nothing, group).isnan()
    loss = parallel.linear_cross_entropy(rows, torch.zeros(2, 3), nothing, group, reduction="sum")
    assert torch.autograd.grad(loss, rows)[0].shape == (0, 3)
    stats = parallel.cross_entropy(rows, torch.zeros(0, 3), group, all_ignored="zero", return_stats=True)[1]
    assert stats.accuracy == 0

    # The targets have no weight, the smoothing has.
    x, target, weight = torch.zeros(2, ranks), torch.tensor([1, 1]), torch.ones(ranks)
    weight[1] = 0
    given = {"weight": weight, "label_smoothing": 0.5}
    got = parallel.cross_entropy(x[:, rank : rank + 1], target, group, row_map="focal", map_params=(2.0,), **given)
    torch.testing.assert_close(got, fastloss.focal_loss(x, target, gamma=2.0, **given), equal_nan=True)

    # Weights of other ranks' classes that are not finite, of targets and of others; all classes are targets; -100 as a
    # target of 8 bits is a class.
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = cuts(200, ranks, 1, "equal")
    here = slice(ends[rank], ends[rank + 1])
    for at, value, values in (
        (3, inf, [0, 3, 199]),
        (3, inf, [0, 199, 1]),
        (198, nan, [0, 2, 199]),
        (0, 1, [156, 0, 7]),
    ):
        weight = torch.rand(200, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - 0.2
        weight[at] = value
        target = torch.tensor([*values, *values[:2]], dtype=torch.uint8)
        for smoothing in (0.0, 0.3):
            leaf, shard = x.clone().requires_grad_(), x[:, here].clone().requires_grad_()
            given = {"label_smoothing": smoothing, "reduction": "sum"}
            want = fastloss.cross_entropy(leaf, target, weight=weight, **given)
            got = parallel.cross_entropy(shard, target, group, weight_shard=weight[here], **given)
            torch.testing.assert_close(got, want, equal_nan=True)
            (grad,) = torch.autograd.grad(got, shard)
            torch.testing.assert_close(grad, torch.autograd.grad(want, leaf)[0][:, here], equal_nan=True)
    x, weight = torch.zeros(ranks, ranks, dtype=torch.float64), torch.arange(ranks).double()
    given = {"label_smoothing": 0.3, "reduction": "none"}
    got = parallel.cross_entropy(x[:, [rank]], torch.arange(ranks), group, weight_shard=weight[[rank]], **given)
    torch.testing.assert_close(got, fastloss.cross_entropy(x, torch.arange(ranks), weight=weight, **given))

    x, target, _ = problem(1, (5, 7), torch.float32)  # rows of an odd number of floats
    torch.testing.assert_close(parallel.cross_entropy(x, target, alone()), fastloss.cross_entropy(x, target))


def test_special_cases(team):
    for ranks in (2, 3):
        team.run(special, ranks)


class Shard(torch.autograd.Function):
    """A rank's part of what all ranks have alike, whose gradient is then put together from those of all ranks."""

    @staticmethod
    def forward(ctx, whole, dim, begin, end, group):
        ctx.shape, ctx.group, ctx.place = whole.shape, group, (dim, begin, end - begin)
        return whole.narrow(*ctx.place).clone()

    @staticmethod
    def backward(ctx, grad):
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(*ctx.place).copy_(grad)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None, None


def gradcheck(rank, group, case):
    """torch.autograd.gradcheck on every rank, of the whole, so that all move the same element at the same time."""
    soft = case.endswith("probabilities")
    x, target, options = problem(5, (2, 5), torch.float64, soft, {"weight": True, "sample_weight": True})
    options |= {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 3.0}
    ends = cuts(5, dist.get_world_size(group), 2)
    assert ends == [0, 0, 5] or len(set(ends)) == len(ends), ends
    weight = options.pop("weight").double()
    hidden, head = (torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 5))

    def part(whole, dim):
        return Shard.apply(whole, dim, ends[rank], ends[rank + 1], group)

    def loss(target, weight, *operands):
        target, given = (part(target, 1) if soft else target), options | {"weight_shard": part(weight, 0)}
        if case.startswith("head"):
            hidden, head = operands
            given["memory_budget"] = 1  # a row at a time
            return parallel.linear_cross_entropy(hidden, part(head, 0), target, group, **given)
        if case == "tokens":
            return parallel.token_log_probs(part(operands[0], 1), target, group, softcap=3.0, return_entropy=True)
        return parallel.cross_entropy(part(operands[0], 1), target, group, reduction="none", **given)

    operands = [hidden, head] if case.startswith("head") else [x]
    for t in (target, weight, *operands) if soft else operands:
        t.requires_grad_()
    assert torch.autograd.gradcheck(loss, (target, weight, *operands))


@pytest.mark.parametrize("case", ("logits", "logits, probabilities", "head", "head, probabilities", "tokens"))
def test_gradcheck_through_the_group(team, case):
    team.run(gradcheck, 2, case)


# ------------------------------------------------------------------------------------------------------- what travels


def collectives(rank, group, options, soft, dtype):
    """(collectives of forward, of backward) of a call; ranks have 5, 6, ... classes."""
    ranks = dist.get_world_size(group)
    ends = list(itertools.accumulate([5 + r for r in range(ranks)], initial=0))
    x, target, options = problem(1, (9, ends[-1]), dtype, soft, options)
    here = slice(ends[rank], ends[rank + 1])
    if options.pop("shard", False):
        options["weight_shard"] = options.pop("weight")[here]
    shard = x[:, here].clone().requires_grad_()
    with Collectives() as forward:
        result = parallel.cross_entropy(shard, target[:, here] if soft else target, group, **options)
    with Collectives() as backward:
        (result[0] if isinstance(result, tuple) else result).backward()
    return forward.calls, backward.calls


@pytest.mark.parametrize(
    "options, numbers",
    (
        ({}, 3),
        ({"label_smoothing": 0.1, "weight": True}, 4),
        ({"weight": True, "shard": True}, 4),
        ({"weight": True, "shard": True, "label_smoothing": 0.1}, 5),
        ({"weight": True, "shard": True, "soft": True}, 5),
        ({"soft": True}, 5),
        ({"return_stats": True}, 6),
        ({"dtype": torch.bfloat16}, 3),
        ({"dtype": torch.float64}, 6),
    ),
    ids=str,
)
def test_one_gather_forward_and_nothing_backward(team, options, numbers):
    """Bytes of a rank: a header of 56 and so many numbers of 4 for each row."""
    options = dict(options)
    soft, dtype = options.pop("soft", False), options.pop("dtype", torch.float32)
    sums = 4 * ("shard" in options and "label_smoothing" in options)  # of a rank's class weights
    for ranks in (2, 4):
        given = options | {"shard_sizes": [5 + r for r in range(ranks)]}
        want = [("allgather_base", 56 + 9 * 4 * numbers + sums)]
        for forward, backward in team.run(collectives, ranks, given, soft, dtype):
            assert forward == want and backward == []


def first_calls(rank, group, given):
    """Collectives of the calls of a new group: uneven shards, the same again, others, these again."""
    group = dist.new_group()
    found = []
    for sizes in ([5, 0, 6, 1], [5, 0, 6, 1], [2, 3, 0, 7], [2, 3, 0, 7]):
        x, target, _ = problem(1, (9, 12), torch.float32)
        offset = sum(sizes[:rank])
        options = {"shard_sizes": sizes} if given else {}
        with Collectives() as calls:
            got = parallel.cross_entropy(x[:, offset : offset + sizes[rank]], target, group, **options)
        torch.testing.assert_close(got, fastloss.cross_entropy(x, target))
        found.append(calls.calls)
    dist.destroy_process_group(group)
    return found


@pytest.mark.parametrize("given", (False, True))
def test_uneven_shards_take_one_gather_from_the_first_call_on(team, given):
    """But for shards of other sizes later, which ranks find out by it."""
    one = [("allgather_base", 56 + 9 * 12)]
    for found in team.run(first_calls, 4, given):
        assert found == [one, one, one if given else 2 * one, one]


def other_sizes(rank, group):
    """Two heads in turn, whose shards differ on one rank alone: what was known is not believed."""
    found = []
    for last in (4, 7, 4, 7, 7):
        sizes = [3] * (dist.get_world_size(group) - 1) + [last]
        x, target, _ = problem(last, (5, sum(sizes)), torch.float64)
        offset = sum(sizes[:rank])
        with Collectives() as calls, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = parallel.cross_entropy(x[:, offset : offset + sizes[rank]], target, group)
        torch.testing.assert_close(got, fastloss.cross_entropy(x, target))
        found.append((len(calls.calls), [str(w.message) for w in caught if w.filename == __file__]))
    return found


def test_shards_may_change_their_sizes(team):
    """With a warning on every rank where that is a second gather each time."""
    for found in team.run(other_sizes, 3):
        for (gathers, said), want in zip(found[1:], (2, 2, 2, 1), strict=True):
            assert gathers == want and len(said) == want - 1
            assert all("give shard_sizes" in words for words in said)


def after_an_error(rank, group):
    """Uneven shards in a new group: a bad target, then a good one; and in another, of which a rank is late."""
    sizes, found = [5, 0, 6, 1], []
    x, target, _ = problem(1, (9, 12), torch.float32)
    shard = x[:, sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    bad = target.clone()
    bad[3] = 12
    group, other = dist.new_group(), dist.new_group()
    with Collectives() as calls:
        found.append(raised(parallel.cross_entropy, shard, bad, group))
        torch.testing.assert_close(parallel.cross_entropy(shard, target, group), fastloss.cross_entropy(x, target))
    patience, _exchange._PATIENCE = _exchange._PATIENCE, datetime.timedelta(milliseconds=100)
    try:
        time.sleep(1.5 if rank == 2 else 0)  # a store in a file waits for whole seconds
        with Collectives() as late:
            got = parallel.cross_entropy(shard, target, other)
    finally:
        _exchange._PATIENCE = patience
    torch.testing.assert_close(got, fastloss.cross_entropy(x, target))
    dist.destroy_process_group(group)
    dist.destroy_process_group(other)
    return found[0], len(calls.calls), len(late.calls)


def test_uneven_shards_after_an_error_and_of_a_rank_that_is_late(team):
    """What ranks told each other in a first call that then raised is known; they wait for it for some time only."""
    for (kind, _), gathers, late in team.run(after_an_error, 4):
        assert kind is IndexError and gathers == 2 and late == 2


def test_ranks_wait_for_each_others_sizes_less_than_the_store_would(tmp_path):
    for timeout, want in ((4, 2), (600, 5)):
        store, waited = dist.FileStore(str(tmp_path / str(timeout)), 2), []
        store.set_timeout(datetime.timedelta(seconds=timeout))

        class Store:
            set, timeout = store.set, store.timeout

            def wait(self, keys, patience, waited=waited):
                waited.append(patience.total_seconds())
                raise RuntimeError("Wait timeout")

        class Group:
            def get_group_store(self, own=Store):
                return own()

        with unittest.mock.patch.multiple(dist, get_rank=lambda g: 0, get_world_size=lambda g: 2):
            assert _exchange._told(Group(), 3, wait=True) is None
        assert waited == [want] and store.get("fastloss/classes/0") == b"3"


# ------------------------------------------------------------------------------------------------------------- errors


def raised(function, *args, **kwargs):
    """The exception's type and words."""
    try:
        function(*args, **kwargs)
    except Exception as e:
        return type(e), str(e)
    return None, ""


def bad_targets(rank, group, culprit, value, sizes):
    """One rank is given a bad target; afterwards the group works."""
    last = dist.get_world_size(group) - 1
    x = torch.zeros(4, 3, requires_grad=True)
    good = torch.tensor([0, 1, 2, -100])
    target = good.clone()
    if rank == culprit:
        target[2] = value
    found = raised(parallel.cross_entropy, x, target, group, shard_sizes=sizes)
    assert parallel.cross_entropy(x, good, group).isfinite()
    assert last > 0
    return found


@pytest.mark.parametrize("ranks", (2, 4))
def test_a_bad_target_of_one_rank_raises_on_all(team, ranks):
    for culprit, value, sizes in ((0, -1, None), (ranks - 1, 3 * ranks, [3] * ranks), (1, 10**9, None)):
        for rank, (kind, message) in enumerate(team.run(bad_targets, ranks, culprit, value, sizes)):
            assert kind is IndexError and f"Target {value} is out of bounds" in message
            assert rank == culprit or f"rank {culprit} of the group" in message


def bad_everywhere(rank, group):
    """What each function raises where the last rank has a bad target, as it is and in a graph."""
    z, x, head, weight = torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(3, 2), torch.ones(3)
    target = torch.tensor([0, 1, 99 if rank == dist.get_world_size(group) - 1 else 2, -100])
    functions = (
        lambda: parallel.cross_entropy(z, target, group, weight_shard=weight, label_smoothing=0.1),
        lambda: parallel.linear_cross_entropy(x, head, target, group, memory_budget=1),
        lambda: parallel.token_log_probs(z, target, group),
        lambda: parallel.linear_token_log_probs(x, head, target, group, return_entropy=True),
    )
    found = [raised(f) for f in functions]
    found += [raised(torch.compile(f, backend="eager", fullgraph=True)) for f in functions]
    found.append(raised(parallel.count, target, group, weight=weight))
    in_graph = torch.compile(parallel.count, backend="eager", fullgraph=True)
    assert in_graph(target, group, weight=weight).isnan()
    return found


def test_a_bad_target_raises_on_all_ranks_from_every_function(team):
    for found in team.run(bad_everywhere, 3):
        assert len(found) == 9 and all(kind is IndexError and "bounds" in words for kind, words in found), found


def unlike(rank, group, options, other):
    return raised(
        parallel.cross_entropy, torch.zeros(4, 3), torch.zeros(4).long(), group, **(other if rank else options)
    )


def test_what_ranks_must_agree_on(team):
    for options, other, kind, message in (
        ({}, {"reduction": "sum"}, ValueError, r"ranks \[1, 2\] of the group were called with other options"),
        ({}, {"softcap": 3.0}, ValueError, "other options"),
        ({"shard_sizes": [3, 3, 3]}, {"shard_sizes": [3, 4, 3]}, (ValueError, RuntimeError), "shard_sizes|rank 1"),
        ({"shard_sizes": [3, 3, 4]}, {"shard_sizes": [3, 3, 4]}, ValueError, "the ranks have .3, 3, 3. classes"),
        ({"weight": torch.ones(8)}, {"weight": torch.ones(8)}, RuntimeError, "weight must be that of all 9 classes"),
        (
            {"weight": torch.ones(8)},
            {"weight": torch.ones(9)},
            RuntimeError,
            "weight must be|rank 0 of the group raised",
        ),
    ):
        for found in team.run(unlike, 3, options, other):
            assert found[0] is not None and issubclass(found[0], kind) and re.search(message, found[1]), found


def wrong_arguments(rank, group):
    x, t = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    found = [
        raised(parallel.cross_entropy, x, t, group, weight=torch.ones(3), weight_shard=torch.ones(3)),
        raised(parallel.cross_entropy, x, t, group, shard_sizes=[3]),
        raised(parallel.cross_entropy, x, t, group, weight_shard=torch.ones(3, requires_grad=True)),
        raised(parallel.cross_entropy, x, t, group, weight=torch.ones(6, requires_grad=True)),
        raised(parallel.cross_entropy, x, t, group, weight_shard=torch.ones(4)),
        raised(parallel.cross_entropy, x, t[:3], group),
        raised(parallel.cross_entropy, x, t, "tp"),
        raised(parallel.cross_entropy, x, t, dist.GroupMember.NON_GROUP_MEMBER),  # as of a group without this rank
        raised(parallel.cross_entropy, x.long(), t, group),
        raised(parallel.cross_entropy, x, t, group, label_smoothing=2.0),
        raised(parallel.cross_entropy, x, t, group, row_map="focal"),
    ]
    soft, wide = {"weight_shard": torch.ones(3).double()}, torch.full((4, 3), 0.5)
    found.append(raised(parallel.cross_entropy, x, wide, group, loss_dtype=torch.float32, **soft))
    assert parallel.cross_entropy(x, wide, group, loss_dtype=torch.float64, **soft).dtype is torch.float64
    logits = torch.zeros(4, 3, requires_grad=True)
    loss = parallel.cross_entropy(logits, t, group)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    found.append(raised(lambda: grad.sum().backward()))
    found.append(raised(torch.func.grad(lambda x: parallel.cross_entropy(x, t, group)), x))
    return found


def test_wrong_arguments(team):
    want = (
        (ValueError, "not both"),
        (ValueError, "shard_sizes must be the number of classes of each of the 2 ranks"),
        (RuntimeError, "not differentiable with respect to argument 'weight_shard'"),
        (RuntimeError, "not differentiable with respect to argument 'weight'"),
        (RuntimeError, "weight_shard must be that of this rank's 3 classes"),
        (ValueError, "Expected input batch_size"),
        (ValueError, "group must be a process group"),
        (ValueError, "group must be a process group"),
        (NotImplementedError, "dtype"),
        (RuntimeError, "label_smoothing"),
        (ValueError, "map_params"),
        (ValueError, "of a loss in torch.float64"),
        (RuntimeError, "give them to fastloss.cross_entropy"),
        (RuntimeError, "setup_context"),
    )
    for found in team.run(wrong_arguments, 2):
        for (kind, message), (want_kind, words) in zip(found, want, strict=True):
            assert kind is want_kind and words in message, (kind, message)


def test_without_a_group():
    with pytest.raises(ValueError, match="init_process_group"):
        parallel.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


def test_what_a_gpu_compares_by_itself():
    """The device's way to see what the CPU reads: nan exactly where the CPU would raise or do it again."""
    sizes = _exchange.fingerprint((3, 4))
    fine = [[3, sizes, 1, 9, 0, 0, 0], [4, sizes, 1, 9, 0, 0, 0]]
    assert _exchange._poison(torch.tensor(fine)) == 0
    for column, value in ((1, 4), (3, 8), (4, 1)):
        wrong = torch.tensor(fine)
        wrong[1, column] = value
        assert _exchange._poison(wrong).isnan()
        found = wrong.tolist()
        with pytest.raises((ValueError, IndexError)):
            _exchange._agreed("f", found, 0, readable=False)
            _exchange._raise_for_others("f", found)


def dying(rank, group):
    if rank == 1:
        os._exit(3)
    return raised(parallel.cross_entropy, torch.zeros(4, 3), torch.zeros(4).long(), group)


def test_a_rank_that_dies_ends_the_others():
    """With torch's own error, within the group's timeout."""
    team = Team(size=3, timeout=10)
    try:
        for pipe in team.pipes:
            pipe.send((dying, 3, ()))
        for kind, message in team.results((0, 2)):
            assert issubclass(kind, RuntimeError) and "fastloss" not in message, message
    finally:
        team.end()


# ------------------------------------------------------------------------------------ module, compile, data parallelism


def module(rank, group):
    x, target, _ = problem(4, (6, 12), torch.float32)
    ends = cuts(12, dist.get_world_size(group), 5)
    here = slice(ends[rank], ends[rank + 1])
    weight = torch.rand(12, generator=torch.Generator().manual_seed(0))
    loss = parallel.ParallelCrossEntropyLoss(group, weight=weight, label_smoothing=0.1)
    assert "label_smoothing=0.1" in repr(loss) and list(loss.state_dict()) == ["weight"]
    want = fastloss.cross_entropy(x, target, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(loss(x[:, here], target), want)
    torch.testing.assert_close(loss(x[:, here], target, normalizer=2.0), loss(x[:, here], target, None, 2.0))
    assert raised(parallel.ParallelCrossEntropyLoss, group, memory_budget=1)[0] is TypeError
    for name in ("inplace_grad", "grad_in_forward"):
        refusing = parallel.ParallelCrossEntropyLoss(group, **{name: True})
        kind, words = raised(refusing, x[:, here], target)
        assert kind is ValueError and f"{name}=True" in words and "leave it out" in words
    given = {"inplace_grad": False, "grad_in_forward": False}
    torch.testing.assert_close(
        parallel.cross_entropy(x[:, here], target, group, **given), fastloss.cross_entropy(x, target)
    )


def test_the_module(team):
    team.run(module, 2)


def compiled(rank, group):
    """Three losses in one graph without breaks: values, gradients and collectives of eager."""
    ranks, dtype = dist.get_world_size(group), torch.float64
    x, target, options = problem(4, (8, 13), dtype, False, {"weight": True, "sample_weight": True})
    ends = cuts(13, ranks, 5)
    here, sizes = slice(ends[rank], ends[rank + 1]), [b - a for a, b in itertools.pairwise(ends)]
    soft = x.softmax(1)[:, here].clone().requires_grad_()
    rows = slice(8 // ranks * rank, 8 // ranks * (rank + 1))
    hidden, head = (torch.randn(n, 5, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (8, 13))
    shard_weight = options.pop("weight")[here].double()
    module = parallel.ParallelCrossEntropyLoss(group, label_smoothing=0.1, row_map="focal", map_params=(1.5,))

    def losses(z, h, w, soft, **others):
        dense, stats = parallel.cross_entropy(
            z.sin(), target, group, weight_shard=shard_weight, reduction="none", return_stats=True, **options, **others
        )
        count = parallel.count(target, group)
        given = {"sequence_parallel": True, "memory_budget": 100, "normalizer": count}
        linear = parallel.linear_cross_entropy(h, w, soft, group, **given)
        log_probs, entropies = parallel.token_log_probs(z, target, group, temperature=0.7, return_entropy=True)
        return dense.square().sum() + linear + (log_probs * entropies).sum() + module(z, target), *stats

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x[:, here], hidden[rows], head[here])]
        with counting() as calls:
            loss, *stats = function(*leaves, soft, shard_sizes=sizes)
            grads = torch.autograd.grad(loss, [*leaves, soft])
        return calls, loss, *stats, *grads

    run(losses)  # ranks learn of each other's classes
    want = run(losses)
    for backend in ("eager", "aot_eager"):
        got = run(torch.compile(losses, backend=backend, fullgraph=True))
        assert want[0] == got[0] and len(got[0]) > 4
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a, b)
    for smoothing in (0.0, 0.3):  # nothing has to say how many classes there are
        leaf, given = x[:, here].clone().requires_grad_(), {"weight_shard": shard_weight, "label_smoothing": smoothing}
        one = torch.compile(parallel.cross_entropy, backend="aot_eager", fullgraph=True)
        found = [f(leaf, target, group, **given) for f in (one, parallel.cross_entropy)]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*(torch.autograd.grad(loss, leaf) for loss in found))


@contextlib.contextmanager
def counting():
    """The names of the collectives that are called, where no dispatch mode may be active."""
    names = (
        "all_gather_single",
        "all_gather_into_tensor",
        "all_reduce",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
    )
    calls, own = [], {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def recording(name):
        return lambda *args, **kwargs: (calls.append(name), own[name](*args, **kwargs))[1]

    try:
        for name in own:
            setattr(dist, name, recording(name))
        yield calls
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def test_torch_compile_takes_the_losses_into_one_graph(team):
    team.run(compiled, 2)


def reordered(rank, group):
    """Inductor may move what does not depend on each other: on the second rank it turns the order round."""
    from torch._inductor import config, memory

    def plan(nodes, *about):
        memory.prepare_planning_info(nodes, *about)
        left, found = list(nodes), []
        while left and rank:
            found.append([n for n in left if not n.mpi_node.pred_nodes & set(left)][-1])
            left.remove(found[-1])
        return found or nodes

    x, target, _ = problem(3, (6, 7), torch.float32)
    shards = [x[:, :3] if rank == 0 else x[:, 3:], x[:4, :2] if rank == 0 else x[:4, 2:]]
    heads, hidden = [x[: 3 if rank == 0 else 4, i : i + 2] for i in (0, 3)], [torch.ones(n, 2) for n in (6, 5)]
    leaves = [t.clone().requires_grad_() for t in (*shards, *heads, *hidden)]

    def losses(a, b, *linear):  # and nothing that Inductor has to compile
        of_heads = [parallel.linear_cross_entropy(h, w, target[: len(h)], group) for w, h in zip(*linear, strict=True)]
        return [parallel.cross_entropy(a, target, group), parallel.cross_entropy(b, target[:4], group), *of_heads]

    found, own = [], memory.reorder_for_peak_memory
    try:
        memory.reorder_for_peak_memory = plan
        with config.patch(force_disable_caches=True):
            for function in (losses, torch.compile(losses, fullgraph=True)):
                given = *leaves[:2], leaves[2:4], leaves[4:]
                function(*given)  # ranks learn of each other's classes
                loss = function(*given)
                found.append((*loss, *torch.autograd.grad(loss, leaves)))
    finally:
        memory.reorder_for_peak_memory = own
    torch.testing.assert_close(*found)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_inductor_keeps_the_order_of_collectives(team):
    team.run(reordered, 2)


def counted(rank, group):
    """DDP with gradient accumulation: the gradients of one process over all samples."""
    ranks = dist.get_world_size(group)
    g = torch.Generator().manual_seed(7)
    inputs = torch.randn(4 * ranks, 5, generator=g, dtype=torch.float64)
    targets = torch.randint(6, (4 * ranks,), generator=g)
    targets[1:3] = -100
    targets[4] = 2
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 6, dtype=torch.float64)
    want = fastloss.cross_entropy(model(inputs), targets)
    grads = torch.autograd.grad(want, list(model.parameters()))
    mine = slice(4 * rank, 4 * rank + 4)
    x, t = inputs[mine], targets[mine]
    n = parallel.count(t, group)
    assert n.dtype is torch.float64 and n.item() == (targets != -100).sum()
    ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    total = 0.0
    for a, b, last in ((x[:1], t[:1], False), (x[1:], t[1:], True)):
        ddp.require_backward_grad_sync = last
        loss = fastloss.cross_entropy(ddp(a), b, normalizer=n)
        total = total + loss.detach()
        (loss * ranks).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    dist.all_reduce(total, group=group)
    torch.testing.assert_close(total, want.detach())
    weight, s = torch.rand(6, generator=g), torch.rand(4 * ranks, generator=g)
    n = parallel.count(t, group, weight=weight, sample_weight=s[mine])
    counts = targets != -100
    torch.testing.assert_close(n, (s.double() * weight.double()[targets.clamp(min=0)])[counts].sum())
    same_bits(group, n)
    assert raised(parallel.count, t, group, sample_weight=s)[0] is ValueError
    assert raised(parallel.count, x, group)[0] is RuntimeError


def test_count_makes_data_parallelism_exact(team):
    team.run(counted, 3)
