"""Lazy heads on plain modules: what stays unmade, what makes the logits, who is refused."""

import copy
import os
import pickle
import random
import socket
import warnings

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.head.lazy_logits import LazyLogits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

B, T, D, V = 2, 9, 8, 31
CHUNKS = nn.LinearCrossEntropyOptions(batch_chunk_size=4)


class Large(TorchDispatchMode):
    """The tensors with at least so many elements that operators return inside, lazy ones apart."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, LazyLogits) and t.numel() >= self.numel:
                self.found.append((str(function), list(t.shape)))
        return out


class Body(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Net(nn.Module):
    def __init__(self, loss, bias=True, dtype=torch.float32):
        super().__init__()
        self.body, self.lm_head = Body(D, D, dtype=dtype), nn.Linear(D, V, bias=bias, dtype=dtype)
        self.loss = loss

    def forward(self, x, t):
        self.logits = self.lm_head(self.body(x))
        return self.loss(self.logits, t)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(B, T, D, generator=generator), torch.randint(V, (B, T), generator=generator)
    t[0, 3], t[1, 1] = -100, -100
    return x, t


def pair(loss, **how):
    """An untouched model, and a lazy one with the same parameters."""
    torch.manual_seed(0)
    plain = Net(loss, **how)
    return plain, fastloss.lazy_head(copy.deepcopy(plain), "lm_head", options=CHUNKS)


def assert_same_step(plain, lazy, data, **tolerances):
    """Value and gradients are the untouched model's."""
    want, got = plain(*data), lazy(*data)
    torch.testing.assert_close(got, want, **tolerances)
    for loss in (want, got):
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), lazy.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerances)


def flat(z, t, **options):
    return F.cross_entropy(z.view(-1, V), t.view(-1), **options)


# --------------------------------------------------------------------------------------------- what stays unmade

UNMADE = {
    "flat": flat,
    "module": lambda z, t: nn.CrossEntropyLoss()(z.reshape(B * T, V), t.flatten()),
    "fastloss": lambda z, t: fastloss.cross_entropy(z.flatten(0, 1), t.flatten(), z_loss=0.01),
    "fastloss module": lambda z, t: fastloss.CrossEntropyLoss()(z.flatten(0, -2), t.flatten()),
    "shifted": lambda z, t: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), t[..., 1:].flatten()),
    "cast": lambda z, t: F.cross_entropy(z.float().to(torch.float32).view(-1, V), t.view(-1)),
    "ignored": lambda z, t: fastloss.cross_entropy(z.view(-1, V), t.view(-1), ignore_index=[-100, 3, 5]),
    "probabilities, none ignored": lambda z, t: fastloss.cross_entropy(
        z.view(-1, V), torch.eye(V)[t.view(-1).clamp(0)], ignore_index=[-100, -1]
    ),
    "focal": lambda z, t: fastloss.focal_loss((z * 2).view(-1, V), t.view(-1), 1.5, weight=torch.linspace(1, 2, V)),
    "focal module, none": lambda z, t: fastloss.FocalLoss(reduction="none")(z.transpose(1, 2), t).square().mean(),
    "poly-1, capped": lambda z, t: fastloss.poly1_loss(z.view(-1, V), t.view(-1), epsilon=2.0, softcap=1.5, z_loss=0.1),
    "generalized": lambda z, t: fastloss.generalized_cross_entropy(z, t, 0.5, class_dim=-1, label_smoothing=0.1),
    "token scaled, sum": lambda z, t: fastloss.token_scaled_cross_entropy(
        z.view(-1, V), t.view(-1), reduction="sum", sample_weight=torch.linspace(0, 2, B * T)
    ),
    "probabilities, focal": lambda z, t: fastloss.focal_loss(z.view(-1, V), torch.eye(V)[t.view(-1).clamp(0)]),
    "sum over a count": lambda z, t: flat(z, t, reduction="sum") / 7,
    "none": lambda z, t: flat(z, t, reduction="none").pow(2).mean(),
    "weight, smoothing": lambda z, t: flat(z, t, weight=torch.linspace(1, 2, V), label_smoothing=0.1),
    "classes second": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "permuted, none": lambda z, t: (F.cross_entropy(z.permute(0, 2, 1), t, reduction="none") ** 2).sum(),
    "class_dim": lambda z, t: fastloss.cross_entropy(z, t, class_dim=-1, sample_weight=torch.ones(B, T) * 0.3),
    "probabilities": lambda z, t: F.cross_entropy(z.view(-1, V), torch.eye(V)[t.view(-1).clamp(0)] * 0.9 + 0.1 / V),
    "scaled": lambda z, t: flat(z * 0.25 / 1.5, t),
    "capped": lambda z, t: flat(2.0 * torch.tanh(z / 3.0) * 1.5, t),
    "capped twice": lambda z, t: fastloss.cross_entropy((z / 2).tanh().view(-1, V), t.view(-1), logit_scale=3.0),
    "scale and cap": lambda z, t: fastloss.cross_entropy((z * 2).view(-1, V), t.view(-1), softcap=1.5, logit_scale=3.0),
    "temperature": lambda z, t: flat(z * torch.tensor(0.5), t),
    "bias": lambda z, t: flat(z * 2 + torch.linspace(0, 1, V), t),
    "scale of each class": lambda z, t: flat(z * torch.linspace(1, 2, V) / 3, t),
    "classes ruled out": lambda z, t: flat(
        torch.where(SOME, -1e4, z.masked_fill(SOME.roll(1), float("-inf"))).index_fill(-1, torch.tensor([1]), -9.0) * 2,
        t.clamp(max=V - 6),
    ),
    "classes ruled out in place": lambda z, t: flat(
        ruled_out(ruled_out(z, (..., slice(V - 3, None))), (slice(None), slice(None), [V - 5])).masked_fill_(SOME, 0.5),
        t,
    ),
    "changed in place": lambda z, t: flat(changed(z), t),
    "less a prior": lambda z, t: flat(-(z - torch.linspace(0, 1, V)).mul(-2.0), t),
    "in two chunks": lambda z, t: sum(
        F.cross_entropy(rows.movedim(-1, 1), labels)
        for rows, labels in zip(z.chunk(2, dim=1), t.chunk(2, dim=1), strict=True)
    ),
    "rows picked": lambda z, t: (
        F.cross_entropy(z.select(0, 1), t[1])
        + F.cross_entropy(z.narrow(1, start=2, length=4).transpose(1, 2), t[:, 2:6])
        + flat(z.index_select(1, torch.tensor([0, 5])), t[:, [0, 5]])
    ),
    "cut vocabulary": lambda z, t: F.cross_entropy(z[..., : V - 5].reshape(-1, V - 5), t.clamp(max=V - 6).view(-1)),
    "rows by mask": lambda z, t: F.cross_entropy(z[t != -100], t[t != -100]),
    "row by number": lambda z, t: F.cross_entropy(z[0, 1:], t[0, 1:]) + F.cross_entropy(z[1][2], t[1][2]),
    "squeezed": lambda z, t: F.cross_entropy(z.unsqueeze(0).squeeze(0).view_as(z).flatten(0, 1), t.view(-1)),
    "log-probabilities": lambda z, t: (
        -picked(F.log_softmax(z, -1), t).mean() + picked(z.log_softmax(2)[:, 1:], t[:, 1:]).sum()
    ),
    "nll of log-probabilities": lambda z, t: F.nll_loss(torch.log_softmax(z / 2, -1).view(-1, V), t.view(-1)),
    "label smoothing by hand": lambda z, t: -(F.log_softmax(z, -1).mean(-1).sum() + F.log_softmax(z, -1).sum() / 7),
    "entropy": lambda z, t: entropy(F.log_softmax(z * 2, -1)).mean(),
    "entropy of some rows at a time": lambda z, t: torch.cat(
        [entropy(p.log_softmax(-1)) for p in z.view(-1, V).split(5)]
    ).sum(),
    "row by row": lambda z, t: sum(F.cross_entropy(row, labels) for row, labels in zip(z, t, strict=True)),
    "split in unequal parts": lambda z, t: sum(
        F.cross_entropy(part.transpose(1, 2), labels)
        for part, labels in zip(z.split([2, T - 2], 1), t.split([2, T - 2], 1), strict=True)
    ),
    "tokens": lambda z, t: sum(part.sum() for part in token_log_probs(3 * torch.tanh(z / 2), t, temperature=0.7)),
    "tokens, capped": lambda z, t: token_log_probs(z * 0.5 + torch.ones(V), t, softcap=1.5)[0].mean(),
    "weighed by accuracy": lambda z, t: flat(z, t) * (z.argmax(-1) == t).sum() * (z.argmax(2, keepdim=True) < 9).sum(),
    "log-probabilities as TRL picks them": lambda z, t: selective_log_softmax(z[:, :-1] / 0.9, t[:, 1:].clamp(0)).sum(),
    "the same for several tokens": lambda z, t: selective_log_softmax(
        2 * torch.tanh(z), torch.stack((t, t + 1), -1).clamp(0, V - 1)
    ).mean(),
    "log of the sum of exponentials": lambda z, t: (
        torch.logsumexp(z, (-1,), keepdim=True).pow(2).mean() + z[0].logsumexp(1).sum()
    ),
    "patched": lambda z, t: patched(z, t),
    "patched module": lambda z, t: patched(z, t, label_smoothing=0.1),
}


def changed(z):
    z /= 2.0
    z -= torch.linspace(0, 1, V)
    return z.clone().mul_(1.5).div_(3.0).tanh_() * 4.0


SOME = torch.arange(V) >= V - 3


def ruled_out(z, classes):
    """As models do with tokens of images and with padded vocabularies; a target among them costs a lot."""
    z[classes] = -1e3
    return z


def picked(log_p, t):
    return log_p.gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def selective_log_softmax(logits, index):
    """The pattern of TRL's function of this name, for float32; 16-bit logits take log_softmax, sequence by sequence."""
    if squeeze := index.ndim == logits.ndim - 1:
        index = index.unsqueeze(-1)
    if logits.dtype in [torch.float32, torch.float64]:
        selected = torch.gather(logits, dim=-1, index=index)
        log_p = selected - torch.stack([torch.logsumexp(lg, dim=-1) for lg in logits]).unsqueeze(-1)
    else:
        pairs = zip(logits, index, strict=True)
        log_p = torch.stack([F.log_softmax(rows, dim=-1).gather(dim=-1, index=labels) for rows, labels in pairs])
    return log_p.squeeze(-1) if squeeze else log_p


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def token_log_probs(z, t, **options):
    return fastloss.token_log_probs(z, t, return_entropy=True, **options)


def patched(z, t, **options):
    with fastloss.patch():
        return nn.CrossEntropyLoss(**options)(z.view(-1, V), t.view(-1))


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("loss", UNMADE.values(), ids=UNMADE)
def test_a_loss_needs_no_logits(loss, bias, data):
    plain, lazy = pair(loss, bias=bias)
    rows = {"rows by mask": B * T - 2, "row by number": T - 1}.get(
        next(k for k, v in UNMADE.items() if v is loss), B * T
    )
    numel = (rows if loss is not UNMADE["shifted"] else B * (T - 1)) * (
        V - 5 if loss is UNMADE["cut vocabulary"] else V
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if any(v is loss and k.startswith("probabilities") for k, v in UNMADE.items()):  # the target is as large
            assert_same_step(plain, lazy, data)
        else:
            got = plain(*data)
            with Large(max(numel, V * D + 1)) as large:  # what is as large as the weight may be its gradient
                lazy(*data).backward()
            assert large.found == []
            lazy.zero_grad()
            assert_same_step(plain, lazy, data)
            assert got.shape == ()
    assert type(lazy.logits) is LazyLogits
    report = fastloss.lazy_head.report(lazy)
    assert report.fused and report.losses >= 1 and report.made == () and report.plain is None
    assert report.bytes_not_allocated >= numel * 4 * 3 or "row" in str(rows)
    assert "fused" in str(report)


def assert_log_probs_as_picked(pick, dtype):
    """Value and gradients of ``pick(logits, tokens)``, of an objective as GRPO's, are the untouched model's; no logits
    are made, of padding neither."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(B, T, D, generator=generator).to(dtype), torch.randint(V, (B, T), generator=generator)
    counts = torch.arange(T - 1) < torch.tensor([[T - 1], [4]])

    def objective(z, t):
        log_p = pick(z[:, :-1] / 0.7, t[:, 1:])
        return -((log_p - log_p.detach() - 0.1 * log_p).exp() * counts).sum() / counts.sum()

    plain, lazy = pair(objective, dtype=dtype)
    with warnings.catch_warnings(), Large((T - 1) * V) as large:
        warnings.simplefilter("error", fastloss.LazyHeadWarning)
        lazy(x, t).backward()
    assert {tuple(shape) for _, shape in large.found} <= {(V, D), (D, V)}  # the weight's gradient
    lazy.zero_grad()
    tolerances = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    assert_same_step(plain, lazy, (x, t), **tolerances)
    report = fastloss.lazy_head.report(lazy)
    assert report.fused and report.losses == (1 if dtype == torch.float32 else B)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_log_probabilities_as_trl_picks_them(dtype):
    assert_log_probs_as_picked(selective_log_softmax, dtype)


def test_what_is_no_index_of_a_class_says_so_as_torch_does(data):
    for wrong in (lambda z, t: z.gather(-1, t.unsqueeze(-1) + V).sum(), lambda z, t: z.gather(-1, t).sum()):
        plain, lazy = pair(wrong)
        with pytest.raises(RuntimeError) as want:
            plain(*data)
        with pytest.warns(fastloss.LazyHeadWarning), pytest.raises(RuntimeError) as got:
            lazy(*data)
        assert str(got.value) == str(want.value)


def test_a_parameter_that_a_loss_refuses(data):
    for call, words in (
        (lambda z, t: fastloss.focal_loss(z.view(-1, V), t.view(-1), -1.0), "gamma"),
        (lambda z, t: fastloss.poly1_loss(z.view(-1, V), t.view(-1), -2.0), "epsilon"),
        (lambda z, t: fastloss.generalized_cross_entropy(z.view(-1, V), t.view(-1), 2.0), "q must be"),
    ):
        with pytest.raises(ValueError, match=words), pytest.warns(UserWarning, match="needs the logits"):
            pair(call)[1](*data)


def test_log_sums_with_and_without_gradients(data):
    """A sum that was kept is not given to whoever wants its gradient; nor one of logits that somebody looked at."""

    def loss(z, t):
        with torch.no_grad():
            before = torch.stack([torch.logsumexp(rows, -1) for rows in z])
        assert not before.requires_grad
        after = sum((rows.logsumexp(-1) * n).sum() for n, rows in enumerate(z, 1))
        return after + before.sum() + (z + 1).logsumexp(-1).pow(2).sum() + z.logsumexp(-1).sum()

    plain, lazy = pair(loss)
    with pytest.warns(fastloss.LazyHeadWarning, match="add needs the logits"):
        assert_same_step(plain, lazy, data)


def test_explain_is_about_the_last_step(data):
    _, lazy = pair(flat)
    assert fastloss.explain(
        lazy
    ).handled_by == "torch: the head has not been called (or torch.compile called it, or " + (
        "the model uses its weight directly)"
    )
    lazy(*data)
    assert fastloss.explain(lazy).handled_by == "fastloss" and "not allocated" in fastloss.explain(lazy).kernel
    with pytest.warns(fastloss.LazyHeadWarning):
        lazy.logits.sum()
    assert "the logits were made by sum at" in fastloss.explain(lazy).handled_by
    lazy.eval()(*data)
    assert "evaluation mode" in fastloss.explain(lazy).handled_by


def test_shape_and_dtype_are_known_without_looking(data):
    plain, lazy = pair(flat)
    plain(*data), lazy(*data)
    z, want = lazy.logits, plain.logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(z, torch.Tensor)
        for ask in (
            lambda z: (z.shape, z.size(), z.size(-1), z.dim(), z.ndim, z.numel(), len(z), z.dtype, z.device),
            lambda z: (z.requires_grad, z.is_leaf, z.is_floating_point(), z.element_size(), z.grad_fn is None),
            lambda z: z.detach().requires_grad,
        ):
            assert ask(z) == ask(want)
    assert fastloss.lazy_head.report(lazy).made == ()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_dtypes(dtype, data):
    def loss(z, t):
        value = F.cross_entropy(z.float().view(-1, V) if dtype.itemsize == 2 else z.view(-1, V), t.view(-1))
        assert value.dtype is (torch.float32 if dtype.itemsize == 2 else dtype)
        return value

    plain, lazy = pair(loss, dtype=dtype)
    tolerances = {} if dtype is torch.float64 else {"rtol": 0.03, "atol": 3e-3}
    assert_same_step(plain, lazy, (data[0].to(dtype), data[1]), **tolerances)
    assert fastloss.lazy_head.report(lazy).fused
    if dtype.itemsize == 2:  # the loss is not rounded to 16 bits
        exact, value = plain.double()(data[0].to(dtype).double(), data[1]), lazy(data[0].to(dtype), data[1])
        assert abs(value.item() - exact.item()) < 4e-3


def test_the_dtype_of_a_loss_with_probabilities_and_class_weights(data):
    """That of class weights too, as of ordinary logits."""

    def loss(z, t):
        p = torch.eye(V)[t.view(-1).clamp(0)].to(z.dtype)
        value = fastloss.cross_entropy(z.view(-1, V), p, weight=torch.linspace(1, 2, V))
        assert value.dtype is torch.float32
        return value

    plain, lazy = pair(loss, dtype=torch.bfloat16)
    assert_same_step(plain, lazy, (data[0].bfloat16(), data[1]), rtol=0.03, atol=3e-3)
    assert fastloss.lazy_head.report(lazy).fused


def test_a_head_that_extends_linear(data):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(D, V)
            self.scale = nn.Parameter(torch.linspace(0.5, 1, V))

        def forward(self, x):
            return super().forward(x).float() * (self.scale.float() * 2)

    plain = Net(flat)
    plain.lm_head = Scaled()
    lazy = fastloss.lazy_head(copy.deepcopy(plain), "lm_head", options=CHUNKS)
    assert_same_step(plain, lazy, data)
    assert fastloss.lazy_head.report(lazy).fused


@pytest.mark.parametrize("inside", (True, False))
def test_autocast(inside, data):
    class Model(Net):
        def forward(self, x, t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.logits = self.lm_head(self.body(x))
                if inside:
                    return flat(self.logits, t)
            return flat(self.logits.float(), t)

    torch.manual_seed(0)
    plain = Model(flat)
    lazy = fastloss.lazy_head(copy.deepcopy(plain), "lm_head", options=CHUNKS)
    assert_same_step(plain, lazy, data, rtol=0.03, atol=3e-3)
    assert lazy.logits.dtype is torch.bfloat16 and fastloss.lazy_head.report(lazy).fused


# ------------------------------------------------------------------------------------------- what makes the logits

MADE = {
    "softmax": lambda z, t: z.softmax(-1)[..., 3].sum(),
    "sub": lambda z, t: (z - 1).pow(2).mean(),
    "logsumexp": lambda z, t: torch.logsumexp(z[:, 1:], 1).sum(),
    "gather": lambda z, t: z.gather(1, t.clamp(0, T - 1).unsqueeze(-1).expand(B, T, V)).sum(),
    "exp": lambda z, t: flat(z.exp(), t),
    "cat": lambda z, t: flat(torch.cat([z[:1], z[1:]]), t),
    "mul": lambda z, t: flat(z * torch.linspace(1, 2, V).expand(T, V), t),
    "view": lambda z, t: z.view(-1, V, 1).cos().sum(),
    "__getitem__": lambda z, t: z[..., 3].sum(),
    "square_": lambda z, t: flat(z.square_(), t),
    "tanh": lambda z, t: flat(z.tanh().tanh(), t),
    "nll_loss": lambda z, t: F.nll_loss(z.view(-1, V), t.view(-1)),
    "mse_loss": lambda z, t: F.mse_loss(z, torch.ones(B, T, V)),
}


@pytest.mark.parametrize("operation", MADE)
def test_anything_else_makes_them_and_says_so(operation, data):
    plain, lazy = pair(MADE[operation])
    with pytest.warns(fastloss.LazyHeadWarning, match=f"{operation} needs the logits themselves") as caught:
        assert_same_step(plain, lazy, data)
    assert len(caught) == 1
    assert caught[0].filename == __file__ and caught[0].lineno == MADE[operation].__code__.co_firstlineno
    report = fastloss.lazy_head.report(lazy)
    assert not report.fused and len(report.made) == 1 and report.made[0].startswith(f"{operation} at {__file__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once for this line
        lazy(*data)


def test_they_are_made_once_and_can_be_read_afterwards(data):
    plain, lazy = pair(flat)
    plain(*data), lazy(*data).backward()
    with pytest.warns(fastloss.LazyHeadWarning, match="topk"):
        torch.testing.assert_close(lazy.logits.topk(2), plain.logits.topk(2))
    with Large(B * T * V) as large:
        assert lazy.logits.detach().view(-1, V).tolist() == lazy.logits.view(-1, V).tolist()
    assert not [name for name, _ in large.found if "mm" in name or "linear" in name]
    torch.testing.assert_close(lazy.logits.detach().numpy(), plain.logits.detach().numpy())
    assert repr(lazy.logits).startswith("tensor(")


def test_what_is_changed_in_place_is_what_counts(data):
    def loss(z, t):
        doubled, view = z * 2, z.view(-1, V)
        z[0] += 1.0
        z.clamp_(max=0.5)
        return flat(doubled, t) + F.cross_entropy(view, t.view(-1)) + z.sum()

    plain, lazy = pair(loss)
    with pytest.warns(fastloss.LazyHeadWarning):
        assert_same_step(plain, lazy, data)


def test_classes_ruled_out_of_logits_that_others_share(data):
    """A view taken before sees the change; a copy does not."""

    def loss(z, t):
        rows, doubled = z.view(-1, V), z * 2
        ruled_out(z, (..., slice(0, 3)))
        return F.cross_entropy(rows, t.view(-1)) + flat(doubled, t) + flat(z, t)

    plain, lazy = pair(loss)
    with pytest.warns(fastloss.LazyHeadWarning, match="__setitem__ needs the logits"):
        assert_same_step(plain, lazy, data)


@pytest.mark.parametrize("key", ((0, ..., 2), (..., 2, slice(None)), (slice(None), 2)), ids=str)
def test_what_is_no_index_of_classes_is_done_as_torch_does(key, data):
    with pytest.warns(fastloss.LazyHeadWarning, match="__setitem__ needs the logits"):
        assert_same_step(*pair(lambda z, t: flat(ruled_out(z, key), t)), data)
    with pytest.warns(fastloss.LazyHeadWarning), pytest.raises(IndexError, match="out of bounds"):
        pair(lambda z, t: ruled_out(z, (..., [V])))[1](*data)


def test_what_torch_takes_besides(data):
    """Arguments of which no rule knows."""

    def loss(z, t):
        z = torch.add(z, torch.ones(V), alpha=2).div(0.5, rounding_mode=None)
        return flat(torch.mul(input=z, other=0.3), t)

    with pytest.warns(fastloss.LazyHeadWarning, match="add needs the logits"):
        assert_same_step(*pair(loss), data)


@pytest.mark.parametrize("wrong", (lambda z: z.chunk(0), lambda z: z.narrow(1, 5, 9), lambda z: z.select(4, 0)))
def test_pieces_that_are_none(wrong, data):
    plain, lazy = pair(lambda z, t: wrong(z))
    with pytest.raises((RuntimeError, IndexError)) as want:
        plain(*data)
    with warnings.catch_warnings(), pytest.raises(type(want.value)) as got:
        warnings.simplefilter("ignore", fastloss.LazyHeadWarning)
        lazy(*data)
    assert str(got.value) == str(want.value)


def test_log_probabilities_of_what_is_changed_in_place_since(data):
    """They are those of before, with gradients and without."""

    def loss(z, t):
        log_p = z.log_softmax(-1)
        ruled_out(z.mul_(2.0), (..., [3]))
        return picked(log_p, t).mean() + flat(z, t)

    plain, lazy = pair(loss)
    fastloss.lazy_head(lazy, "lm_head", evaluation=True)
    with pytest.warns(fastloss.LazyHeadWarning, match="mul_ needs the logits"):
        assert_same_step(plain, lazy, data)
        with torch.no_grad():
            torch.testing.assert_close(lazy(*data), plain(*data))


def test_changes_in_place_without_gradients(data):
    """The values change, and no derivative, in the middle of what has one."""

    def loss(z, t):
        with torch.no_grad():
            z.mul_(2.0)
        return flat(z, t)

    with pytest.warns(fastloss.LazyHeadWarning, match="mul_ needs the logits"):
        assert_same_step(*pair(loss), data)


def test_changes_in_place_reach_whoever_takes_the_gradient(data):
    """An autograd.Function of somebody else, after changes that left the logits unmade; and who reads them."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().sum() / 2

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    def loss(z, t):
        ruled_out(z, (..., [1, 2]))
        return Sum.apply(z.div_(10.0))

    plain, lazy = pair(loss)
    with pytest.warns(fastloss.LazyHeadWarning):
        assert_same_step(plain, lazy, data)
        torch.testing.assert_close(lazy.logits + 0.0, plain.logits)


MAKING = {
    "scale": lambda z: z * 0.5,
    "prior": lambda z: z - SCORES,
    "cap": torch.tanh,
    "fill": lambda z: z.masked_fill(SOME, -3.0),
    "copy": lambda z: z.clone(),
    "view": lambda z: z.view(-1, V),
    "rows": lambda z: z[1:] if z.shape[0] > 2 else z,
    "swapped": lambda z: z.transpose(0, -2),
    "log-probabilities": lambda z: z.log_softmax(-1),
    "unknown": torch.sigmoid,
}
CHANGING = {
    "scale": lambda z: z.div_(2.0),
    "prior": lambda z: z.add_(SCORES),
    "cap": lambda z: z.tanh_(),
    "fill": lambda z: ruled_out(z, (..., [2, 4])),
    "a row": lambda z: z[0].fill_(1.0),
    "unknown": lambda z: z.relu_(),
}
SCORES = torch.linspace(0.5, 1, V)


def test_random_programs(data):
    """Whatever is made of the logits and of what was made, and changed in place, in any order."""
    fused = 0
    for seed in range(80):
        r = random.Random(seed)
        steps = [(r.choice((MAKING, MAKING, CHANGING)), r.random()) for _ in range(r.randint(1, 6))]
        steps = [(kind is MAKING, r.choice(list(kind.values())), place) for kind, place in steps]

        places = r.random(), r.random()

        def loss(z, t, steps=steps, places=places):
            made = [z]
            for new, operation, place in steps:
                result = operation(made[int(place * len(made))])
                made += [result] if new else []
            picked = [made[int(place * len(made))] for place in places]
            return sum(F.cross_entropy(z.reshape(-1, V), t.flatten()[: z.numel() // V]) for z in picked)

        plain, lazy = pair(loss, bias=r.random() < 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastloss.LazyHeadWarning)
            try:
                plain(*data).backward()
            except RuntimeError:  # a view that cannot be, or what backward needs was changed
                continue
            plain.zero_grad()
            assert_same_step(plain, lazy, data)
        fused += fastloss.lazy_head.report(lazy).fused
    assert fused > 20


def test_read_after_an_optimizer_step_raises(data):
    _, lazy = pair(flat)
    optimizer = torch.optim.SGD(lazy.parameters(), 0.1)
    lazy(*data).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="head's weight changed in place"), pytest.warns(fastloss.LazyHeadWarning):
        lazy.logits.sum()


class Foreign(torch.autograd.Function):
    """Somebody else's loss; an autograd.Function does not ask __torch_function__."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize(
    "how",
    (lambda z: z, lambda z: 3 * torch.tanh(z / 2), lambda z: (z + torch.ones(V)).transpose(1, 2), lambda z: z[:, 1:]),
)
def test_an_autograd_function_of_somebody_else(how, data):
    plain, lazy = pair(lambda z, t: Foreign.apply(how(z)))
    with pytest.warns(fastloss.LazyHeadWarning):
        assert_same_step(plain, lazy, data)


def test_whoever_hooks_the_logits_gets_their_gradient(data):
    def loss(z, t):
        z.register_hook(seen.append)
        return flat(z, t)

    seen = []
    plain, lazy = pair(loss)
    with pytest.warns(fastloss.LazyHeadWarning):
        assert_same_step(plain, lazy, data)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])


# --------------------------------------------------------------------------------- when the head is lazy, and undoing


def test_ordinary_logits_without_gradients_and_in_evaluation(data):
    _, lazy = pair(flat)
    with torch.no_grad():
        lazy(*data)
    assert type(lazy.logits) is torch.Tensor and "gradients are off" in str(fastloss.lazy_head.report(lazy))
    lazy.eval()(*data)
    assert type(lazy.logits) is torch.Tensor and "evaluation" in fastloss.lazy_head.report(lazy).plain
    fastloss.lazy_head(lazy, "lm_head", evaluation=True, options=CHUNKS)
    with torch.no_grad(), Large(B * T * V) as large:
        value = lazy(*data)
    assert type(lazy.logits) is LazyLogits and large.found == [] and not value.requires_grad
    torch.testing.assert_close(value, fastloss.restore_head(lazy)(*data).detach())


def test_restore_and_context_manager(data):
    plain, lazy = pair(flat)
    before = list(plain.state_dict())
    assert fastloss.restore_head(plain) is plain
    with fastloss.lazy_head(plain, "lm_head") as inside:
        assert inside is plain and list(plain.state_dict()) == before
        plain(*data)
        assert type(plain.logits) is LazyLogits
    plain(*data)
    assert type(plain.logits) is torch.Tensor and "forward" not in plain.lm_head.__dict__
    with pytest.raises(ValueError, match="no lazy head"):
        fastloss.lazy_head.report(plain)
    assert fastloss.restore_head(lazy) is lazy
    lazy(*data)
    assert type(lazy.logits) is torch.Tensor


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_have_a_head_of_their_own(copied, data):
    net = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    other = copied(fastloss.lazy_head(net, head="1"))
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].bias.zero_()
    assert fastloss.restore_head(copy.deepcopy(other))(data[0]).abs().max() == 0
    z = other(data[0])
    assert type(z) is LazyLogits
    with pytest.warns(fastloss.LazyHeadWarning):
        assert z.abs().max() == 0 and net(data[0]).abs().max() > 0


def test_tied_weights(data):
    class Tied(Net):
        def __init__(self):
            super().__init__(flat, bias=False)
            self.embedding = nn.Embedding(V, D)
            self.embedding.weight = self.lm_head.weight

        def forward(self, x, t):
            return super().forward(self.embedding(t.clamp(0)), t)

    torch.manual_seed(0)
    plain = Tied()
    assert_same_step(plain, fastloss.lazy_head(copy.deepcopy(plain), "lm_head"), data)


def test_the_head_of_a_model_within_a_model(data):
    """As in a vision and language model that names no head of its own."""

    class Named(Net):
        def get_output_embeddings(self):
            return self.lm_head

    class Larger(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def get_output_embeddings(self):
            return None

        def forward(self, x, t):
            return self.parts[-1](self.parts[0](x), t)

    model = fastloss.lazy_head(Larger(Body(D, D), Named(flat)))
    model(*data).backward()
    assert fastloss.lazy_head.report(model).fused
    with pytest.raises(ValueError, match=r"names no head; give its name as head="):
        fastloss.lazy_head(Larger(Named(flat), Named(flat)))


def test_head_by_module_or_by_an_unknown_name():
    net = Net(flat)
    assert fastloss.lazy_head(net, net.lm_head) is net
    with pytest.raises(ValueError, match=r"head='nothing' is no module.*'lm_head' \(31 classes\)"):
        fastloss.lazy_head(net, "nothing")
    with pytest.raises(ValueError, match="get_output_embeddings"):
        fastloss.lazy_head(net)
    with pytest.raises(ValueError, match="not a module of this model"):
        fastloss.lazy_head(net, nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not str"):
        fastloss.lazy_head("llama")
    with pytest.raises(TypeError, match="head must be the name"):
        fastloss.lazy_head(net, 3)


# ---------------------------------------------------------------------------------------------------- who is refused


class Quantised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.round(), self.bias)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(D, V)


def zero_3():
    head = nn.Linear(D, V)
    head.weight.ds_id = 0
    head.weight.data = torch.empty(0)
    return head


def int8():
    head = nn.Linear(D, V)
    head.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    return head


def replaced():
    head = nn.Linear(D, V)
    head.forward = lambda x: x
    return head


REFUSED = {
    "wrapped by PEFT": Adapted,
    "forward of its own": lambda: Quantised(D, V),
    "ZeRO-3": zero_3,
    "int8": int8,
    "was replaced": replaced,
    "not a torch.nn.Linear": lambda: nn.Bilinear(D, D, V),
    "float8_e4m3fn": lambda: nn.Linear(D, V).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_at_once_and_left_alone(reason):
    net = Net(flat)
    net.lm_head = REFUSED[reason]()
    before = dict(net.lm_head.__dict__)
    with pytest.raises(NotImplementedError, match=f"{reason}.*left as it is"):
        fastloss.lazy_head(net, "lm_head")
    assert net.lm_head.__dict__ == before


def test_a_head_that_becomes_unfit_gives_ordinary_logits(data):
    plain, lazy = pair(flat)
    lazy.lm_head.register_full_backward_hook(lambda *_: None)
    with pytest.warns(fastloss.LazyHeadWarning, match="backward hooks"):
        assert_same_step(plain, lazy, data)
    assert type(lazy.logits) is torch.Tensor and "backward hooks" in str(fastloss.lazy_head.report(lazy))


# ---------------------------------------------------------------------------------------- transforms, several processes


def test_compiled_whole_gives_ordinary_logits_without_a_break(data):
    plain, lazy = pair(flat)
    assert_same_step(plain, torch.compile(lazy, fullgraph=True, backend="aot_eager"), data)


@pytest.mark.parametrize("inside", (True, False))
def test_compiled_whole_with_a_break(inside, data):
    """The loss in the model, or outside."""
    torch._dynamo.reset()
    plain, _ = pair(flat if inside else lambda z, t: z)
    lazy = fastloss.lazy_head(copy.deepcopy(plain), "lm_head", compiled=True, options=CHUNKS)
    models = [plain, torch.compile(lazy, backend="aot_eager")]
    if not inside:
        models = [Outside(model) for model in models]
    for _ in range(2):
        assert_same_step(*models, data)
        assert fastloss.lazy_head.report(lazy).fused
        for model in models:
            model.zero_grad()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compiled=True"):
        torch.compile(lazy, backend="aot_eager", fullgraph=True)(*data)


class Outside(nn.Module):
    """The loss of a model that returns logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return flat(self.model(x, t), t)


def test_compiled_body(data):
    plain, lazy = pair(flat)
    lazy.body.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(plain, lazy, data)
    assert fastloss.lazy_head.report(lazy).fused


def test_transforms_get_ordinary_logits(data):
    plain, lazy = pair(flat)

    def of(net):
        parameters = dict(net.named_parameters())
        return torch.func.grad(lambda p: torch.func.functional_call(net, p, data))(parameters)

    want, got = of(plain), of(lazy)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def _sharded(net, kind):
    """The model on two processes, with a lazy head."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(fastloss.lazy_head(net, "lm_head"))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    if kind == "fsdp2, lazy before":
        fastloss.lazy_head(net, "lm_head")
    fully_shard(net.body, mesh=mesh)
    if kind == "fsdp2, head alone":
        fully_shard(net.lm_head, mesh=mesh)
        with pytest.raises(NotImplementedError, match="fully_shard on its own"):
            fastloss.lazy_head(net, "lm_head")
    fully_shard(net, mesh=mesh)
    return net if kind != "fsdp2" else fastloss.lazy_head(net, "lm_head")


def _process(rank, port, state, data):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    x, t = (part[rank : rank + 1] for part in data)
    reference = Net(flat)
    reference.load_state_dict(state)
    (sum(reference(a[None], b[None]) for a, b in zip(*data, strict=True)) / 2).backward()
    for kind in ("ddp", "fsdp2", "fsdp2, lazy before", "fsdp2, head alone"):
        net = Net(flat)
        net.load_state_dict(state)
        net = _sharded(net, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error", fastloss.LazyHeadWarning)
            for _ in range(2):
                net.zero_grad()
                net(x, t).backward()
        assert kind == "fsdp2, head alone" or fastloss.lazy_head.report(net).fused
        for (name, want), p in zip(reference.named_parameters(), net.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, want.grad, msg=lambda m, at=(kind, name): f"{at}: {m}")
    torch.distributed.destroy_process_group()


def test_two_processes(data):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = (port, Net(flat).state_dict(), data)
    torch.multiprocessing.start_processes(_process, arguments, nprocs=2, start_method="spawn")
