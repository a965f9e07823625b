"""What is special about torch's other elementwise losses: edges, extremes, dtypes, shapes, errors."""

import warnings

import fastloss
import fastloss.nn
import pytest
import torch
import torch.nn.functional as F

NAN, INF = float("nan"), float("inf")
NAMES = (
    "binary_cross_entropy",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "kl_div",
    "margin_ranking_loss",
    "poisson_nll_loss",
    "soft_margin_loss",
)
MODULES = (
    ("BCELoss", {}),
    ("GaussianNLLLoss", {"full": True, "eps": 1e-3}),
    ("HingeEmbeddingLoss", {"margin": 0.3}),
    ("KLDivLoss", {"log_target": True, "reduction": "batchmean"}),
    ("MarginRankingLoss", {"margin": 0.2, "reduction": "sum"}),
    ("PoissonNLLLoss", {"log_input": False, "full": True, "eps": 1e-3}),
    ("SoftMarginLoss", {"reduction": "none"}),
)
# Values at the edges of the definitions, an operand each.
EDGES = {
    "binary_cross_entropy": [
        ([0, 1, 0, 1, 0, 1, 1e-40, 0.5, 1e-7, 1 - 2**-24], [0, 0, 1, 1, 0.5, 0.5, 1, 0, 0.25, 1]),
    ],
    "gaussian_nll_loss": [
        ([1, 1, 1, NAN, 1, INF, 2, 1], [1, 2, 3, 1, NAN, 1, 2, 1], [1, 1e-9, 0, 1, 1, 1, INF, NAN]),
    ],
    "hinge_embedding_loss": [
        ([1, 1, 1 - 1e-7, 100, -100, NAN, NAN, 0.5, 0.5, INF, -INF], [1, -1, -1, -1, -1, 1, -1, 0.3, 0, -1, -1]),
    ],
    "kl_div": [([-1, -1, -INF, -INF, NAN, -1, -1, -1], [0, 0.5, 0, 0.5, 0.5, -0.5, INF, 1e-40])],
    "margin_ranking_loss": [
        ([1, 1, 2, 3, NAN, 1, INF], [1, 2, 1, 3, 2, 0, 1], [1, -1, 1, -1, 1, NAN, -1]),
    ],
    "poisson_nll_loss": [([1, 1, 1, 100, -200, 1, 88.7, 0, NAN], [0, 1, 2, 2, -1, NAN, 3, 0.5, 1])],
}


def leaves(values, dtype=torch.float32, device="cpu", fixed=()):
    return [
        torch.tensor([float(v) for v in operand], dtype=dtype, device=device).requires_grad_(i not in fixed)
        for i, operand in enumerate(values)
    ]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in EDGES),
        ("kl_div", {"log_target": True}),
        ("poisson_nll_loss", {"full": True}),
        ("poisson_nll_loss", {"log_input": False}),
        ("poisson_nll_loss", {"log_input": False, "full": True}),
        ("margin_ranking_loss", {"margin": 1.0}),
        ("hinge_embedding_loss", {"margin": 0.5}),
    ],
    ids=str,
)
def test_edges_are_torchs(name, options, dtype, device):
    """Values and every gradient where a definition has a kink, a bound or no value."""
    fixed = (1,) if name == "hinge_embedding_loss" else ()
    for values in EDGES[name]:
        if options.get("log_input") is False:
            values = ([abs(v) for v in values[0]], values[1])
        results = []
        for function in (getattr(fastloss, name), getattr(F, name)):
            operands = leaves(values, dtype, device, fixed)
            loss = function(*operands, reduction="none", **options)
            wanted = [t for t in operands if t.requires_grad]
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), wanted)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_extreme_scores_are_finite(dtype, device):
    """torch's soft margin loss is inf, and its gradient nan, from 89 on."""
    x = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, device=device, requires_grad=True)
    t = torch.tensor([1.0, 1.0, -1.0, -1.0], device=device)
    loss = fastloss.soft_margin_loss(x, t, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss, torch.tensor([0, 1e4, 1e4, 0], dtype=dtype, device=device))
    assert torch.equal(x.grad, torch.tensor([0, -1, 1, 0], dtype=dtype, device=device))
    x, t = (torch.full((33,), v, dtype=dtype, device=device) for v in (-1e4, 0.25))
    assert fastloss.kl_div(x, t, reduction="batchmean").isfinite()
    assert fastloss.gaussian_nll_loss(x / 100, t, t).isfinite()
    assert fastloss.poisson_nll_loss(x, t, reduction="none").float().sub(2500).abs().max() < 16


def arguments(name, *shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(shape, generator=generator).to(device, dtype) for _ in range(2))
    sign = torch.where(second > 0.5, 1, -1).to(dtype)
    third = {"gaussian_nll_loss": (second + 0.5,), "margin_ranking_loss": (sign,)}.get(name, ())
    return (first, sign if name in ("hinge_embedding_loss", "soft_margin_loss") else second, *third)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_mixed_as_torch(name, reduction, device):
    """The loss's dtype, whatever torch takes; integer targets."""
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    for of_input in kinds[:4]:
        for of_target in kinds:
            first, second, *rest = arguments(name, 3, 4, device=device)
            args = (first.to(of_input), (second * 3 if of_target in kinds[4:] else second).to(of_target), *rest)
            results = []
            for function in (getattr(F, name), getattr(fastloss, name)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        results.append(function(*args, reduction=reduction))
                    except RuntimeError as error:
                        results.append(error)
            theirs, ours = results
            if isinstance(theirs, RuntimeError):
                assert isinstance(ours, RuntimeError) and str(ours)[:25] == str(theirs)[:25]
            else:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("name", NAMES[1:])
def test_broadcast_as_torch(name, device):
    """Without a warning, gradients in the operands' shapes."""
    for shapes in (((3, 4), (4,)), ((3, 1), (1, 4)), ((3, 4), ()), ((1, 4), (3, 1))):
        results = []
        for function in (F, fastloss):
            x, t = (arguments(name, *s, dtype=torch.float64, device=device)[i] for i, s in enumerate(shapes))
            if name == "margin_ranking_loss":
                t = t.expand(max(x.shape, t.shape, key=len)) if t.dim() != 2 else t
                args = (x, t, torch.ones(1, 1, device=device, dtype=x.dtype))
            else:
                args = (x, t, *arguments(name, *x.shape, dtype=x.dtype, device=device)[2:])
            args[0].requires_grad_()
            try:
                loss = getattr(function, name)(*args, reduction="none")
                results.append((loss.detach(), *torch.autograd.grad(loss.sum(), args[0])))
            except RuntimeError as error:
                results.append(str(error)[:20])
        if isinstance(results[0], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(*results)


@pytest.mark.parametrize(("name", "options"), MODULES)
def test_modules(name, options, device):
    function = {"BCELoss": NAMES[0], "KLDivLoss": "kl_div"}.get(name)
    function = function or next(n for n in NAMES if n.replace("_", "") == name.lower())
    args = arguments(function, 3, 4, dtype=torch.float64, device=device)
    ours, theirs = (getattr(m, name)(**options) for m in (fastloss.nn, torch.nn))
    torch.testing.assert_close(ours(*args), theirs(*args))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    mask = torch.arange(12, device=device).reshape(3, 4) % 5 != 1
    torch.testing.assert_close(
        ours(*args, mask=mask, weight=mask.double()) if name != "BCELoss" else ours(*args, mask=mask),
        getattr(fastloss, function)(*args, mask=mask, **options),
    )


# ------------------------------------------------------------------------------------------------ outside of the domain


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("value", (-1e-7, 1.0000001, NAN, INF), ids=str)
def test_what_is_no_probability(value, reduction, device):
    """Anywhere, in either operand; torch's exception. On a GPU it is raised later, and the process lives on."""
    for operand, name in enumerate(("input", "target")):
        for at in (0, 16385, 40000):
            args = list(arguments("binary_cross_entropy", 40001, dtype=torch.float64, device=device))
            args[operand][at] = value
            args[0].requires_grad_()
            with pytest.raises(RuntimeError, match=f"all elements of {name} should be between 0 and 1"):
                loss = fastloss.binary_cross_entropy(*args, reduction=reduction)
                assert device == "cuda" and loss.isnan().any()
                fastloss.check_errors()
            mask = torch.ones(40001, dtype=torch.bool, device=device)
            mask[at] = False
            assert fastloss.binary_cross_entropy(*args, reduction=reduction, mask=mask).isfinite().all()
    fastloss.check_errors()


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_negative_variance(reduction, device):
    x, t, var = arguments("gaussian_nll_loss", 3, 20000, device=device)
    var[1, 19999] = -1e-9
    with pytest.raises(ValueError, match="var has negative entry/entries"):
        fastloss.gaussian_nll_loss(x, t, var, reduction=reduction)
        fastloss.check_errors()
    with pytest.raises(ValueError, match="var has negative entry/entries"):
        fastloss.gaussian_nll_loss(x, t, -1.0)
    var[1, 19999] = NAN  # is not negative
    assert fastloss.gaussian_nll_loss(x, t, var, reduction=reduction).isnan().any()
    fastloss.check_errors()


def test_weights_of_nan_are_no_bad_probabilities(device):
    x, t = arguments("binary_cross_entropy", 50, device=device)
    assert fastloss.binary_cross_entropy(x, t, torch.full((50,), NAN, device=device)).isnan()
    fastloss.check_errors()


# ------------------------------------------------------------------------------------------------------ each by itself


def test_weights_of_binary_cross_entropy_as_torch(device):
    x, t = arguments("binary_cross_entropy", 3, 4, dtype=torch.float64, device=device)
    for shape in ((4,), (3, 1), (), (3, 4)):
        w = torch.rand(shape, dtype=torch.float64, device=device) + 0.5
        for reduction in ("mean", "sum", "none"):
            got, want = (m.binary_cross_entropy(x, t, w, reduction=reduction) for m in (fastloss, F))
            torch.testing.assert_close(got, want)
    for shape in ((2, 3, 4), (5,)):
        with pytest.raises(RuntimeError, match="broadcast"):
            fastloss.binary_cross_entropy(x, t, torch.ones(shape, device=device))


def test_variances_of_every_shape(device):
    x, t = arguments("kl_div", 3, 4, dtype=torch.float64, device=device)
    for var in (2.0, *(torch.rand(s, dtype=x.dtype, device=device) + 0.5 for s in ((3,), (3, 1), (1, 4), (3, 4)))):
        got, want = (m.gaussian_nll_loss(x, t, var, full=True) for m in (fastloss, F))
        torch.testing.assert_close(got, want)
    for shape in ((), (4,), (1, 1), (3, 0), (2, 4)):
        with pytest.raises(ValueError, match="var is of incorrect size"):
            fastloss.gaussian_nll_loss(x, t, torch.ones(shape, device=device))
    for var in (1, True, None, [1.0]):
        with pytest.raises(TypeError, match="var"):
            fastloss.gaussian_nll_loss(x, t, var)


def test_the_bound_of_the_variance_has_the_gradient_at_it(device):
    """As torch's, which sets it without autograd; in forward mode and twice too."""
    args = (torch.tensor(v, dtype=torch.float64, device=device) for v in ([0.5, 1.0], [0.75, 3.0], [1e-3, 2.0]))
    x, t, var = (a.requires_grad_() for a in args)
    hessians = [
        torch.autograd.functional.hessian(lambda v, f=f: f(x, t, v, eps=0.1), var)
        for f in (fastloss.gaussian_nll_loss, F.gaussian_nll_loss)
    ]
    torch.testing.assert_close(*hessians)
    ((_, got), (_, want)) = (
        torch.func.jvp(lambda v, f=f: f(x.detach(), t.detach(), v, eps=0.1), (var.detach(),), (torch.ones_like(var),))
        for f in (fastloss.gaussian_nll_loss, fastloss.formulas.gaussian_nll_loss)
    )
    torch.testing.assert_close(got, want.mean())


def test_reductions_of_kl_div_and_the_warning(device):
    x, t = arguments("kl_div", 6, 5, dtype=torch.float64, device=device)
    x = x.log_softmax(1).requires_grad_()
    with pytest.warns(UserWarning, match="reduction: 'mean' divides the total loss by both") as caught:
        fastloss.kl_div(x, t)
    assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for args, options in (
            ((x, t), {}),
            ((x[0], t), {}),
            ((x, t.log()), {"log_target": True}),
            ((x[0, 0], t[0, 0]), {}),
        ):
            got, want = (m.kl_div(*args, reduction="batchmean", **options) for m in (fastloss, F))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, want)))
        assert fastloss.kl_div(x[:0], t[:0], reduction="batchmean").isnan()
    with pytest.warns(UserWarning, match="size_average"):
        got, want = (m.kl_div(x, t, size_average=True, reduction="batchmean") for m in (fastloss, F))
    torch.testing.assert_close(got, want)
    for integer in (x.long(), x.to(torch.complex64)):
        with pytest.raises(RuntimeError, match=r"kl_div: (Integral|Complex) inputs not supported"):
            fastloss.kl_div(integer, t, reduction="sum")


def test_a_batchmean_compiled_for_one_size_serves_others(device):
    compiled = torch.compile(
        lambda x, t: fastloss.kl_div(x, t, reduction="batchmean"), backend="aot_eager", dynamic=True, fullgraph=True
    )
    for rows in (3, 5):
        x, t = arguments("kl_div", rows, 4, device=device)
        torch.testing.assert_close(compiled(x, t), F.kl_div(x, t, reduction="batchmean"))


def test_errors_are_torchs(device):
    x, t = arguments("kl_div", 3, 4, device=device)
    with pytest.raises(RuntimeError, match="All input tensors should have same dimension"):
        fastloss.margin_ranking_loss(x, t, t[0])
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        fastloss.soft_margin_loss(x[0], t)
    with pytest.raises(ValueError, match="is deprecated"):
        fastloss.binary_cross_entropy(x, t[:1])
    with pytest.raises(RuntimeError, match="Found dtype Double but expected Float"):
        fastloss.binary_cross_entropy(x, t.double())
    for name in NAMES:
        args = arguments(name, 3, 4, device=device)
        with pytest.raises(ValueError, match=r"nope is not (a )?valid"):
            getattr(fastloss, name)(*args, reduction="nope")
        if name != "binary_cross_entropy":
            with pytest.raises((TypeError, AttributeError), match="must be Tensor"):
                getattr(fastloss, name)(args[0], [1.0], *args[2:])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_as_torch(name, device):
    args = arguments(name, 3, 4, dtype=torch.bfloat16, device=device)
    if device == "cuda" and name == "binary_cross_entropy":
        with torch.autocast(device), pytest.raises(RuntimeError, match="unsafe to autocast"):
            fastloss.binary_cross_entropy(*args)
        return
    with torch.autocast(device, dtype=torch.bfloat16):
        got, want = (getattr(m, name)(*args, reduction="sum") for m in (fastloss, F))
    assert got.dtype == want.dtype


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_integer_inputs_are_torchs(reduction, device):
    """Poisson's loss is one of the default dtype, whatever the target is; hinge embedding's one of integers."""
    x, sign = torch.tensor([[1, 2, -3], [0, 5, 4]], device=device), torch.tensor([1, -1, 1], device=device)

    def outcome(function, *operands, **options):
        try:
            return function(*operands, reduction=reduction, **options)
        except RuntimeError as error:  # the mean of integers
            return str(error)

    for input in (x, x.to(torch.int32), x.abs().to(torch.uint8)):
        for target in (sign, sign.to(torch.float16), sign.to(torch.float64)):
            for log_input in (True, False):
                positive = [t.abs() + 1 for t in (input, target)]
                calls = [outcome(m.poisson_nll_loss, *positive, log_input=log_input) for m in (fastloss, F)]
                torch.testing.assert_close(*calls)
            ours, torchs = (outcome(m.hinge_embedding_loss, input, target, margin=4) for m in (fastloss, F))
            assert type(ours) is type(torchs)
            if isinstance(torchs, torch.Tensor):
                torch.testing.assert_close(ours, torchs)
    with pytest.raises(NotImplementedError, match=r"torch\.int64: expected float32"):
        fastloss.hinge_embedding_loss(x, sign, weight=torch.ones(3, device=device))
