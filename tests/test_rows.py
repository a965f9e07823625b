"""Statistics of shards of the classes (fastloss.rows): any split, merged, gives the whole's loss and gradients."""

import itertools
import random

import fastloss
import pytest
import torch
from fastloss._library import ops
from fastloss.rows import RowOptions, finish_row_stats, merge_row_stats, row_gradient, row_maps, row_stats

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FEATURES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none", "weight": True, "z_loss": 0.01},
    "smoothing": {"label_smoothing": 0.2},
    "weighted": {"weight": True, "sample_weight": True, "ignore_index": 1, "logit_scale": -0.7},
    "everything": {
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "normalizer": True,
    },
    "focal": {"row_map": "focal", "map_params": (2.0,), "weight": True},
    "poly-1": {"row_map": "poly1", "map_params": (-0.5,)},
    "generalized cross entropy": {"row_map": "generalized_cross_entropy", "map_params": (0.7,), "label_smoothing": 0.1},
    "token-scaled": {"row_map": "token_scaled", "reduction": "none"},
    "focal and everything": {
        "row_map": "focal",
        "map_params": (0.5,),
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
    },
}
SHAPES = ((1, 3), (9, 40), (5, 1037), (2, 11, 3, 5), (3, 150, 7))


def splits(classes, seed):
    """Ranges of the classes: one of them whole, others uneven, with shards of no and of one class."""
    rng = random.Random(seed)
    yield [0, classes]
    yield [0, 0, 1, classes, classes]
    cuts = sorted(rng.randint(0, classes) for _ in range(rng.randint(2, 6)))
    yield [0, *cuts, classes]


def problem(shape, dtype, features, soft, layout, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    classes, rows = shape[1], (shape[0], *shape[2:])
    x = (3 * torch.randn(shape, generator=g)).to(dtype)
    if layout == "classes last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = x.repeat_interleave(2, 0)[::2]
    target = torch.randn(shape, generator=g).softmax(1).to(dtype) if soft else torch.randint(classes, rows, generator=g)
    options = dict(features)
    if not soft and classes > 1:
        target[torch.rand(rows, generator=g) < 0.2] = options.get("ignore_index", -100)
        target.view(-1)[0] = 0
    elif soft:
        options.pop("ignore_index", None)
    tensors = {}
    if options.pop("weight", False):
        tensors["weight"] = (torch.rand(classes, generator=g) + 0.5).to(device)
    if options.pop("sample_weight", False):
        tensors["sample_weight"] = (torch.rand(rows, generator=g) + 0.5).to(device)
    if options.pop("normalizer", False):
        tensors["normalizer"] = torch.tensor(11.5, dtype=torch.float64, device=device)
    return x.to(device), target.to(device), tensors, options


def whole(x, target, tensors, o):
    """(loss, by logits, by probabilities) of the fused operators, for the gradient of rows 1, 2, …"""
    accum = torch.float64 if x.dtype is torch.float64 else torch.float32
    given = [None if (t := tensors.get(n)) is None else t.to(accum) for n in ("weight", "sample_weight")]
    logits, _, reduction, dtype, flags, _, _, _, *rest = o.arguments(x, target, None, None)
    call = (logits, target, reduction, dtype), (*given, tensors.get("normalizer"), *rest)
    loss, saved, _ = ops.cross_entropy_forward(*call[0], flags | 1, *call[1])
    g = 1 + torch.arange(loss.numel(), dtype=loss.dtype, device=x.device).view(loss.shape)
    by_logits = ops.cross_entropy_backward(g, saved, *call[0], flags, *call[1])
    by_target = None
    if target.is_floating_point():
        by_target = ops.cross_entropy_target_backward(g, saved, *call[0], flags, *call[1])
    return loss, g, by_logits, by_target


def parts(x, target, ends):
    for a, b in itertools.pairwise(ends):
        yield a, x[:, a:b], target[:, a:b] if target.is_floating_point() else target


def in_shards(x, target, tensors, o, ends, g, best=False):
    weight = {"weight": tensors.get("weight")}
    stats = [row_stats(s, t, o, class_offset=a, **weight, best=best) for a, s, t in parts(x, target, ends)]
    result = finish_row_stats(merge_row_stats(stats), target, o, **tensors)
    sample = {"sample_weight": tensors.get("sample_weight")}

    def gradient(of_target):
        return torch.cat(
            [
                row_gradient(s, t, result.saved, g, o, class_offset=a, **weight, **sample, of_target=of_target)
                for a, s, t in parts(x, target, ends)
            ],
            1,
        )

    return result, gradient(False), gradient(True) if target.is_floating_point() else None


def tolerance(dtype, want, factor=1):
    eps = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    eps *= factor
    scale = want.abs().max().item() if want.numel() else 0
    return {"rtol": eps, "atol": eps * scale + (2.0**-24 if dtype is torch.float16 else 0)}


@pytest.mark.parametrize("layout", ("contiguous", "classes last", "sliced"))
@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_split_gives_the_whole(dtype, features, soft, layout, device):
    for seed, shape in enumerate(SHAPES):
        x, target, tensors, options = problem(shape, dtype, features, soft, layout, device, seed)
        o = RowOptions(total_classes=shape[1], **options)
        loss, g, by_logits, by_target = whole(x, target, tensors, o)
        for ends in splits(shape[1], seed):
            result, by_shards, target_by_shards = in_shards(x, target, tensors, o, ends, g)
            assert result.loss.dtype == loss.dtype and by_shards.dtype == dtype
            accum = torch.float64 if dtype is torch.float64 else torch.float32
            torch.testing.assert_close(result.loss, loss, **tolerance(accum, loss), equal_nan=True)
            # e^-l has l times the rounding of l.
            near = tolerance(dtype, by_logits, 5 if "row_map" in features else 1)
            torch.testing.assert_close(by_shards, by_logits, **near, equal_nan=True)
            if soft:
                torch.testing.assert_close(target_by_shards, by_target, **tolerance(dtype, by_target))


@pytest.mark.parametrize("row_map", ("none", "focal"))
def test_against_the_public_loss_and_autograd(row_map, device):
    """The fused operators are not the only yardstick: cross_entropy and focal loss composed of torch operations."""
    x, target, tensors, _ = problem((6, 40), torch.float64, {"weight": True}, False, "contiguous", device)
    o = RowOptions(total_classes=40, row_map=row_map, map_params=(1.5,) if row_map == "focal" else ())
    leaf = x.clone().requires_grad_()
    w = tensors["weight"].double()
    counts, index = target != -100, target.clamp(min=0)
    nll = -leaf.log_softmax(1).gather(1, index[:, None])[:, 0]
    mapped = (1 - (-nll).exp()) ** 1.5 * nll if row_map == "focal" else nll
    want = (w[index] * mapped)[counts].sum() / w[index][counts].sum()
    if row_map == "none":
        torch.testing.assert_close(want, fastloss.cross_entropy(leaf, target, weight=w))
    want.backward()
    result, grad, _ = in_shards(x, target, tensors, o, [0, 7, 40], torch.ones((), dtype=torch.float64, device=device))
    torch.testing.assert_close(result.loss, want.detach())
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_the_rows(dtype, device):
    for features in ({}, {"label_smoothing": 0.1}, {"softcap": 5.0, "logit_scale": 0.5}):
        x, target, tensors, options = problem((7, 300), dtype, features, False, "contiguous", device)
        o = RowOptions(total_classes=300, **options)
        _loss, stats = fastloss.cross_entropy(x, target, return_stats=True, **options)
        one = torch.ones((), device=device, dtype=o.loss_dtype_for(x))
        result, *_ = in_shards(x, target, tensors, o, [0, 0, 13, 299, 300], one, best=True)
        torch.testing.assert_close(result.lse, stats.lse, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.entropy, stats.entropy, rtol=1e-5, atol=1e-5)
        z = x.double() * options.get("logit_scale", 1.0)
        z = 5 * torch.tanh(z / 5) if "softcap" in options else z
        log_p = z.log_softmax(1)
        torch.testing.assert_close(result.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)
        assert (result.argmax == stats.argmax).all()


def test_the_same_order_gives_the_same_bits(device):
    x, target, tensors, options = problem((50, 500), torch.float32, FEATURES["everything"], False, "sliced", device)
    o = RowOptions(total_classes=500, **options)
    one = torch.ones((), device=device)
    runs = [in_shards(x, target, tensors, o, [0, 100, 101, 400, 500], one, best=True) for _ in range(3)]
    for result, grad, _ in runs[1:]:
        assert torch.equal(grad, runs[0][1])
        assert all(torch.equal(a, b) for a, b in zip(result, runs[0][0], strict=True))


def test_rows_that_are_not_finite(device):
    """Rows of -inf in one shard, in all of them, nan, +inf: as the whole has them."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [[-inf, -inf, 1.0, 2.0], [-inf] * 4, [0.0, nan, 1.0, 2.0], [0.0, inf, 1.0, 2.0], [inf, 0.0, 1.0, -inf]],
        device=device,
    )
    target = torch.tensor([3, 0, 3, 0, 2], device=device)
    o = RowOptions(total_classes=4, reduction="none")
    loss, g, by_logits, _ = whole(x, target, {}, o)
    result, grad, _ = in_shards(x, target, {}, o, [0, 2, 4], g)
    torch.testing.assert_close(result.loss, loss, equal_nan=True)
    torch.testing.assert_close(grad, by_logits, equal_nan=True)
    torch.testing.assert_close(result.lse, x.logsumexp(1), equal_nan=True)


def test_all_rows_ignored(device):
    x, target = torch.randn(3, 4, device=device), torch.full((3,), -100, device=device)
    one = torch.ones((), device=device)
    for extra, want in (({}, float("nan")), ({"all_ignored": "zero"}, 0.0)):
        result, grad, _ = in_shards(x, target, {}, RowOptions(total_classes=4, **extra), [0, 1, 4], one)
        torch.testing.assert_close(result.loss.cpu(), torch.tensor(want), equal_nan=True)
        assert (grad == 0).all()
    normalizer = {"normalizer": torch.tensor(3.0, dtype=torch.float64, device=device)}
    result, grad, _ = in_shards(x, target, normalizer, RowOptions(total_classes=4), [0, 1, 4], one)
    assert result.loss == 0 and (grad == 0).all()


def test_targets_elsewhere_are_not_bad_and_others_are():
    x, o = torch.zeros(2, 3), RowOptions(total_classes=8)
    stats = row_stats(x, torch.tensor([0, 7]), o, class_offset=3)
    assert (stats[2] == -torch.inf).all() and (stats[1] == 3).all()
    for bad in (8, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            row_stats(x, torch.tensor([0, bad]), o, class_offset=3)


def test_the_slope_of_generalized_cross_entropy_where_a_probability_is_small():
    """q p^q is far below the rounding of 1, of which the map is a difference."""
    x, target = torch.tensor([[0.0, 30.0], [0.0, 3.0]]), torch.tensor([0, 0])
    o = RowOptions(total_classes=2, reduction="sum", row_map="generalized_cross_entropy", map_params=(0.7,))
    loss, saved, *_ = finish_row_stats(row_stats(x, target, o, class_offset=0), target, o)
    grad = row_gradient(x, target, saved, torch.ones_like(loss), o, class_offset=0)
    wide = x.double().requires_grad_()
    p = wide.softmax(1)[:, 0]
    ((1 - p**0.7) / 0.7).sum().backward()
    torch.testing.assert_close(grad.double(), wide.grad, rtol=1e-5, atol=0)


def test_row_maps():
    maps = row_maps()
    assert maps["none"] == (0, ()) and maps["focal"][1] == ("gamma",) and maps["token_scaled"][1] == ()
    assert sorted(number for number, _ in maps.values()) == list(range(len(maps)))


def test_wrong_arguments():
    x, t, o = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), RowOptions(total_classes=8)
    for wrong in (
        {"reduction": "most"},
        {"row_map": "nope"},
        {"row_map": "focal"},
        {"total_classes": 0},
        {"label_smoothing": 2.0},
        {"softcap": 0.0},
        {"loss_dtype": torch.int32},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "reduction" not in wrong else "most"):
            RowOptions(**({"total_classes": 8} | wrong))
    for offset in (-1, 6):
        with pytest.raises(ValueError, match="class_offset"):
            row_stats(x, t, o, class_offset=offset)
    with pytest.raises(ValueError, match="logits must be floating point"):
        row_stats(x.long(), t, o, class_offset=0)
    with pytest.raises(ValueError, match="target must be"):
        row_stats(x, t[:1], o, class_offset=0)
    with pytest.raises(ValueError, match="weight must be that of all classes"):
        row_stats(x, t, o, class_offset=0, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"2\*\*24"):
        row_stats(x, t, RowOptions(total_classes=2**25), class_offset=0, best=True)
    stats = row_stats(x, t, o, class_offset=0)
    with pytest.raises(ValueError, match="merge_row_stats"):
        merge_row_stats([])
    with pytest.raises(ValueError, match="merge_row_stats"):
        merge_row_stats([stats, stats[:, :1]])
    with pytest.raises(ValueError, match="3 fields"):
        finish_row_stats(stats, t, RowOptions(total_classes=8, label_smoothing=0.1))
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        finish_row_stats(stats, t, o, sample_weight=torch.ones(3))
    with pytest.raises(ValueError, match="normalizer"):
        finish_row_stats(stats, t, o, normalizer=torch.ones(3))
    with pytest.raises(ValueError, match="grad_output must have shape"):
        row_gradient(x, t, finish_row_stats(stats, t, o).saved, torch.ones(2), o, class_offset=0)


def test_plain_statistics_are_three_numbers_a_row():
    stats = row_stats(
        torch.zeros(5, 7, 2), torch.zeros(5, 2, dtype=torch.int64), RowOptions(total_classes=7), class_offset=0
    )
    assert stats.shape == (3, 5, 2) and stats.dtype is torch.float32


def test_the_old_name():
    with pytest.warns(DeprecationWarning, match="finish_row_stats"):
        assert fastloss.rows.row_loss is finish_row_stats
    with pytest.raises(AttributeError, match="row_losses"):
        _ = fastloss.rows.row_losses
