"""A head whose classes are sharded over ranks (fastloss.parallel.linear_cross_entropy), on gloo, against the whole."""

import importlib
import itertools

import fastloss
import pytest
import torch
import torch.distributed as dist
from fastloss import parallel
from fastloss.head import chunked
from fastloss.parallel import _exchange
from ranks import Collectives
from test_parallel import OPTIONS, close, cuts, problem, raised, same_bits

linear = importlib.import_module("fastloss.parallel.linear_cross_entropy")  # the function has its name in the package


def head_problem(seed, rows, classes, features, dtype, soft, options):
    g = torch.Generator().manual_seed(100 + seed)
    _, target, options = problem(seed, (rows, classes), dtype, soft, options)
    x = torch.randn(rows, features, generator=g).to(dtype)
    return (
        x,
        torch.randn(classes, features, generator=g).to(dtype),
        torch.randn(classes, generator=g).to(dtype),
        target,
        options,
    )


def compare(rank, group, seed, rows, classes, dtype, kind, soft, options, bias, sequence, budget):
    """One call against one process, with every gradient."""
    ranks = dist.get_world_size(group)
    x, w, b, target, options = head_problem(seed, rows, classes, 6, dtype, soft, options)
    ends = cuts(classes, ranks, seed, kind)
    here = slice(ends[rank], ends[rank + 1])
    leaves = [t.double().clone().requires_grad_() for t in (x, w, b)]
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    labels = target.double().clone().requires_grad_() if soft else target
    if soft:
        leaves.append(labels)
        if "weight" in wide:
            wide["weight"] = wide["weight"].clone().requires_grad_()
            leaves.append(wide["weight"])
    z = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2] if bias else None)
    want = fastloss.cross_entropy(z, labels, **wide)
    want_loss = want[0] if options.get("return_stats") else want
    g = 1 + torch.arange(want_loss.numel(), dtype=torch.float64).view(want_loss.shape)
    grads = torch.autograd.grad(want_loss, leaves, g, allow_unused=True)

    rows_here = slice(rows // ranks * rank, rows // ranks * (rank + 1)) if sequence else slice(None)
    mine = [x[rows_here].clone(), w[here].clone(), b[here].clone()]
    if soft:
        target = target[:, here].clone()
        mine.append(target)
    if "weight" in options:
        options["weight_shard"] = options.pop("weight")[here].clone()
        if soft:
            mine.append(options["weight_shard"])
    for leaf in mine:
        leaf.requires_grad_()
    result = parallel.linear_cross_entropy(
        mine[0],
        mine[1],
        target,
        group,
        linear_bias_shard=mine[2] if bias else None,
        memory_budget=budget,
        sequence_parallel=sequence,
        **options,
    )
    loss = result[0] if options.get("return_stats") else result
    close(loss, want_loss, dtype, "loss")
    found = torch.autograd.grad(loss, mine, g.to(loss.dtype), allow_unused=True)
    names = ("input", "head", "bias", "target", "weight")
    for name, got, leaf, grad in zip(names, found, mine, grads, strict=False):
        if grad is None:
            assert name == "bias" and got is None
            continue
        part = grad[rows_here] if name == "input" else grad[:, here] if name == "target" else grad[here]
        assert got.shape == leaf.shape and got.dtype == leaf.dtype
        scale = grad.abs().max().view(1)
        close(
            torch.cat([got.double().flatten(), scale]), torch.cat([part.flatten(), scale]), dtype, f"gradient by {name}"
        )
    same_bits(group, loss, *([] if sequence else [found[0]]))
    if options.get("return_stats"):
        close(result[1].lse, want[1].lse, dtype, "lse")
        close(result[1].entropy, want[1].entropy, torch.float16, "entropy")
        assert result[1].argmax.shape == want[1].argmax.shape


def compare_many(rank, group, cases):
    for case in cases:
        try:
            compare(rank, group, **case)
        except Exception as e:
            raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e


@pytest.mark.parametrize("ranks", (2, 3, 4))
@pytest.mark.parametrize("sequence", (False, True), ids=("whole rows", "sharded rows"))
def test_shards_of_a_head_give_the_whole(team, ranks, sequence):
    """Every option, in chunks of a few rows and in one."""
    cases, kinds = [], itertools.cycle(("uneven", "equal", "empty"))
    dtypes, budgets = itertools.cycle((torch.float64, torch.float32, torch.bfloat16)), itertools.cycle((200, None, 1))
    for seed, (soft, options) in enumerate(itertools.product((False, True), OPTIONS.values())):
        options = {k: v for k, v in options.items() if not soft or k != "ignore_index"}
        case = {"seed": seed, "rows": 12, "classes": 13, "dtype": next(dtypes), "kind": next(kinds), "soft": soft}
        cases.append(case | {"options": options, "bias": seed % 2 == 0, "sequence": sequence, "budget": next(budgets)})
        next(budgets if seed % 3 == 0 else dtypes)
    team.run(compare_many, ranks, cases)


def collectives(rank, group, sequence):
    ranks = dist.get_world_size(group)
    x, w, _, target, _ = head_problem(0, 12, 5 * ranks, 6, torch.float32, False, {})
    rows = slice(12 // ranks * rank, 12 // ranks * (rank + 1)) if sequence else slice(None)
    x, w = x[rows].clone().requires_grad_(), w[5 * rank : 5 * rank + 5].clone().requires_grad_()
    with Collectives() as forward:
        options = {"memory_budget": 5 * 4 * 4, "sequence_parallel": sequence, "shard_sizes": [5] * ranks}
        loss = parallel.linear_cross_entropy(x, w, target, group, **options)
    with Collectives() as backward:
        loss.backward()
    return forward.calls, backward.calls


def test_what_travels(team):
    """Statistics in forward; in backward the input's gradient, a chunk of 4 rows at a time."""
    statistics = ("allgather_base", 56 + 12 * 12)
    for forward, backward in team.run(collectives, 2, False):
        assert forward == [statistics]
        assert backward == [("allreduce", 4 * 6 * 4)] * 3
    for forward, backward in team.run(collectives, 2, True):
        rows = ("allgather_base", 6 * 6 * 4)
        assert forward == [rows, statistics]
        gathered, scattered = ("allgather_base", 2 * 6 * 4), ("reduce_scatter_base", 4 * 6 * 4)
        assert backward == [gathered, *[gathered, scattered] * 2, scattered]  # the next chunk's input comes meanwhile


def order(rank, group, sequence):
    """What backward does of each chunk, in turn."""
    x, w, _, target, _ = head_problem(0, 12, 10, 6, torch.float32, False, {})
    rows = slice(6 * rank, 6 * rank + 6) if sequence else slice(None)
    x, w, done = x[rows].clone().requires_grad_(), w[5 * rank : 5 * rank + 5].clone().requires_grad_(), []
    name = "all_reduce" if not sequence else "reduce_scatter_" + ("single" if dist_has_single() else "tensor")
    start, by_weight = getattr(dist, name), chunked._Products.by_weight_and_bias

    class Started:
        def __init__(self, *args, **kwargs):
            assert kwargs["async_op"]
            done.append("start")
            self.work = start(*args, **kwargs)

        def wait(self):
            done.append("wait")
            self.work.wait()

    loss = parallel.linear_cross_entropy(x, w, target, group, memory_budget=5 * 4 * 4, sequence_parallel=sequence)
    try:
        setattr(dist, name, Started)
        chunked._Products.by_weight_and_bias = lambda *args: (done.append("weight"), by_weight(*args))
        loss.backward()
    finally:
        setattr(dist, name, start)
        chunked._Products.by_weight_and_bias = by_weight
    return done


def dist_has_single():
    """Whether torch has the names of 2.13."""
    return hasattr(dist, "reduce_scatter_single")


def test_the_sum_of_a_chunk_travels_while_the_weights_gradient_is_computed(team):
    for done in team.run(order, 2, False):
        assert done == ["start", "weight"] * 3 + ["wait"] * 3
    for done in team.run(order, 2, True):  # two chunks of all ranks' rows are held at most
        assert done == ["start", "weight", *["start", "weight", "wait"] * 2, "wait"]


def arriving(rank, group, budget):
    """What forward does of an input in three pieces, in turn; values and gradients are those of one process."""
    ranks, done, dtype = dist.get_world_size(group), [], torch.float64
    x, w, _, target, _ = head_problem(0, 6 * ranks, 5 * ranks, 6, dtype, False, {})
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    want = fastloss.linear_cross_entropy(*leaves, target, reduction="none")
    rows, here = slice(6 * rank, 6 * rank + 6), slice(5 * rank, 5 * rank + 5)
    mine = [t.clone().requires_grad_() for t in (x[rows], w[here])]
    start, make, piece = _exchange.start_gather, chunked._Products.logits, linear._PIECE

    class Started:
        def __init__(self, work):
            self.work = work

        def wait(self):
            done.append("wait")
            self.work.wait()

    def starting(shard, group, wait=False):
        everyone, work = start(shard, group, wait)
        done.append("statistics" if wait else f"start {shard.shape[0] // 6}")
        return everyone, work if wait else Started(work)

    given = {"memory_budget": budget, "sequence_parallel": True, "shard_sizes": [5] * ranks}
    try:
        linear._PIECE = ranks * 2 * 6 * 8
        _exchange.start_gather = starting
        chunked._Products.logits = lambda self, x, out: (done.append(f"logits {len(x)}"), make(self, x, out))[1]
        loss = parallel.linear_cross_entropy(*mine, target, group, reduction="none", **given)
        forward = list(done)
    finally:
        linear._PIECE, _exchange.start_gather, chunked._Products.logits = piece, start, make
    torch.testing.assert_close(loss, want)
    weights = 1 + torch.arange(6 * ranks, dtype=dtype)
    grads = torch.autograd.grad(want, leaves, weights)
    for got, grad, part in zip(torch.autograd.grad(loss, mine, weights), grads, (rows, here), strict=True):
        torch.testing.assert_close(got, grad[part])
    return forward


def test_an_input_arrives_in_pieces_while_logits_are_made(team):
    started = ["start 2"] * 3
    for done in team.run(arriving, 2, 3 * 5 * 8):  # logits of 3 rows
        assert done == [*started, *["wait", "logits 3", "logits 1"] * 3, "statistics"]
    for done in team.run(arriving, 3, None):
        assert done == [*started, *["wait"] * 3, "logits 18", "statistics"]


def lost(rank, group):
    """What is raised where a piece does not arrive, and how many collectives followed."""
    start, followed = _exchange.start_gather, []

    class Broken:
        def wait(self):
            raise RuntimeError("Connection closed by peer")

    def starting(shard, group, wait=False):
        followed.extend([wait] * wait)
        return start(shard, group, wait)[0], Broken()

    try:
        _exchange.start_gather = starting
        head = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(4).long()
        found = [raised(parallel.linear_cross_entropy, *head, group, sequence_parallel=True, memory_budget=1)]
    finally:
        _exchange.start_gather = start
    return *found, followed


def test_ranks_do_not_wait_twice_for_one_that_is_lost(team):
    for (kind, words), followed in team.run(lost, 2):
        assert kind is RuntimeError and words == "Connection closed by peer" and not followed


def bad_in_pieces(rank, group):
    """A bad target of one rank, and a weight that does not fit: what has been started is not missed by the others."""
    ranks, piece = dist.get_world_size(group), linear._PIECE
    x, w, _, target, _ = head_problem(0, 6 * ranks, 5 * ranks, 6, torch.float64, False, {})
    x, w, bad = x[6 * rank : 6 * rank + 6], w[5 * rank : 5 * rank + 5], target.clone()
    bad[1] = 99 if rank == 1 else bad[1]
    given = {"memory_budget": 40, "sequence_parallel": True}
    try:
        linear._PIECE = ranks * 6 * 8
        found = [raised(parallel.linear_cross_entropy, x, w, bad, group, **given)]
        given["weight"] = torch.ones(5 * ranks + (rank == 1), dtype=torch.float64)
        found.append(raised(parallel.linear_cross_entropy, x, w, target, group, **given))
        given["weight"] = torch.ones(5 * ranks, dtype=torch.float64)
        assert parallel.linear_cross_entropy(x, w, target, group, **given).isfinite()
    finally:
        linear._PIECE = piece
    return found


def test_an_error_leaves_out_no_piece(team):
    for found in team.run(bad_in_pieces, 3):
        assert [kind for kind, _ in found] == [IndexError, RuntimeError], found


def errors(rank, group):
    x, w, t = torch.zeros(2, 2, 6), torch.zeros(5, 6), torch.zeros(2, 2, dtype=torch.long)
    bad = torch.full_like(t, 10 if rank else 0)
    good = parallel.linear_cross_entropy(x, w, t, group, reduction="none")
    assert good.shape == (2, 2)
    one = parallel.linear_cross_entropy(x[0, 0], w, t[0, 0], group)
    torch.testing.assert_close(one, good[0, 0])
    return [
        raised(parallel.linear_cross_entropy, x, w, bad, group),
        raised(parallel.linear_cross_entropy, x, w[:, :4], t, group),
        raised(parallel.linear_cross_entropy, x, w, t, group, linear_bias_shard=torch.zeros(4)),
        raised(parallel.linear_cross_entropy, x, w, t[:1], group),
        raised(parallel.linear_cross_entropy, x, w, t, group, memory_budget=0),
        raised(parallel.linear_cross_entropy, x, w, t, group, memory_budget=100 + rank),
        raised(parallel.linear_cross_entropy, x[0, 0], w, t[0, 0], group, sequence_parallel=True),
    ]


def test_errors(team):
    wants = (
        (IndexError, "Target 10 is out of bounds"),
        (RuntimeError, "linear_weight_shard (C_r, D)"),
        (RuntimeError, "linear_bias_shard"),
        (RuntimeError, "target"),
        (ValueError, "memory_budget"),
        (ValueError, "ranks [1] of the group were called with other options"),
        (ValueError, "input needs rows"),
    )
    for found in team.run(errors, 2):
        for (kind, message), (want, words) in zip(found, wants, strict=True):
            assert kind is want and words in message, (kind, message)


def log_probs(rank, group, head, sequence=False):
    """Log-probabilities and entropies, and their gradients: of both, and of each alone."""
    ranks, dtype = dist.get_world_size(group), torch.float64
    x, w, b, target, _ = head_problem(3, 12, 11, 6, dtype, False, {})
    ends = cuts(11, ranks, 4)
    here = slice(ends[rank], ends[rank + 1])
    given = {"temperature": 0.7, "softcap": 3.0, "return_entropy": True}
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    z = torch.nn.functional.linear(*leaves)
    wants = fastloss.token_log_probs(z, target, **given)
    rows = slice(12 // ranks * rank, 12 // ranks * (rank + 1)) if sequence else slice(None)
    if head:
        mine = [t.clone().requires_grad_() for t in (x[rows], w[here], b[here])]
        given["linear_bias_shard"] = mine[2]
        found = parallel.linear_token_log_probs(
            *mine[:2], target, group, memory_budget=100, sequence_parallel=sequence, **given
        )
        parts = (rows, here, here)
    else:
        leaves = [z]
        mine = [z.detach()[:, here].clone().requires_grad_()]
        found = parallel.token_log_probs(mine[0], target, group, **given)
        parts = ((slice(None), here),)
    g = torch.linspace(-1, 2, 12, dtype=dtype)
    for of in ((0, 1), (0,), (1,)):
        want = torch.autograd.grad(sum((g * wants[i]).sum() for i in of), leaves, retain_graph=True)
        got = torch.autograd.grad(sum((g * found[i]).sum() for i in of), mine, retain_graph=True)
        for a, c, part in zip(want, got, parts, strict=True):
            torch.testing.assert_close(c, a[part])
    for want, got in zip(wants, found, strict=True):
        torch.testing.assert_close(got, want)
    if not head:
        half = parallel.token_log_probs(mine[0].bfloat16().view(3, 4, -1), target.view(3, 4), group)
        assert half.dtype is torch.float32 and half.shape == (3, 4)
        assert raised(parallel.token_log_probs, mine[0], target[:3], group)[0] is ValueError
        assert raised(parallel.token_log_probs, mine[0], target, group, temperature=0.0)[0] is ValueError


def test_log_probabilities_and_entropies(team):
    team.run(log_probs, 3, False)
    team.run(log_probs, 3, True)
    team.run(log_probs, 2, True, True)


def products(rank, group, budget):
    """How often logits are made, forward and backward together, backward twice; the gradients of the two."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((8, 5), (6 + rank, 5)))
    target, made = torch.randint(13, (8,), generator=g), []
    counted = chunked._Products.logits
    try:
        chunked._Products.logits = lambda self, rows, out: (made.append(len(rows)), counted(self, rows, out))[1]
        sizes = [6, 7]
        loss = parallel.linear_cross_entropy(x, w, target, group, shard_sizes=sizes, memory_budget=budget)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        once = len(made)
        for a, b in zip(first, torch.autograd.grad(loss, (x, w)), strict=True):
            assert torch.equal(a, b)
    finally:
        chunked._Products.logits = counted
    return made[:once]


def test_logits_that_fit_the_budget_are_made_once(team):
    """Others twice, a chunk at a time: 2 rows of 8 bytes and 7 classes, in forward and in backward."""
    for made in team.run(products, 2, None):
        assert made == [8]
    for made in team.run(products, 2, 150):
        assert len(made) > 2 and sum(made) == 16
