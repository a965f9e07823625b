"""Bad input: torch's exception types, messages that name argument, value, place and remedy, and nothing touched."""

from contextlib import suppress

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss._library import ops

NAN = float("nan")
CE, NLL = (fastloss.cross_entropy, F.cross_entropy), (fastloss.nll_loss, F.nll_loss)


def x(*shape, dtype=torch.float32):
    return torch.randn(shape or (4, 3), generator=torch.Generator().manual_seed(0)).to(dtype)


def t(*shape, dtype=torch.long):
    return torch.zeros(shape or (4,), dtype=dtype)


# name: (losses, arguments, options, what the message must say beside torch's own words)
CASES = {
    "batch": ((CE, NLL), (x(4, 3), t(3)), {}, ["input batch_size (4)", "target batch_size (3)"]),
    "batch, spatial": ((CE, NLL), (x(4, 3, 5), t(3, 5)), {}, ["input batch_size (4)", "target batch_size (3)"]),
    "spatial size": ((CE, NLL), (x(4, 3, 3), t(4, 2)), {}, ["Expected target size [4, 3], got [4, 2]"]),
    "spatial size, 4-D": (
        (CE, NLL),
        (x(2, 3, 4, 5), t(2, 5, 4)),
        {},
        ["size mismatch (got input: [2, 3, 4, 5]", "[2, 5, 4]"],
    ),
    "spatial size, 5-D": ((CE, NLL), (x(2, 3, 4, 5, 6), t(2, 4, 5, 7)), {}, ["[2, 4, 5, 6]", "[2, 4, 5, 7]"]),
    "target dimensions": ((CE, NLL), (x(4, 3), t(4, 2)), {}, ["multi-target not supported", "[4, 2]"]),
    "target without dimensions": ((CE, NLL), (x(4, 3), t(1).view(())), {}, ["target"]),
    "target dimensions, 4-D": ((CE, NLL), (x(2, 3, 4, 5), t(2, 4)), {}, ["[2, 4, 5]"]),
    "1-D input, long target": ((CE, NLL), (x(5), t(3)), {}, ["size 1", "3"]),
    "float target": ((CE, NLL), (x(4, 3), x(4)), {}, ["target"]),
    "float target of a wrong shape": ((CE,), (x(4, 3), x(4, 4)), {}, ["target"]),
    "bool target": (
        (CE, NLL),
        (x(4, 3), t(dtype=torch.bool)),
        {},
        ["expected target dtype to be Long or Byte", "torch.bool"],
    ),
    "complex target": ((CE, NLL), (x(4, 3), t(dtype=torch.complex64)), {}, ["target"]),
    "integer probabilities": (
        (CE,),
        (x(4, 3), t(4, 3)),
        {},
        ["Expected floating point type for target with class probabilities", "[4, 3]"],
    ),
    "bool probabilities": ((CE,), (x(4, 3), t(4, 3, dtype=torch.bool)), {}, ["floating point"]),
    "integer input": ((CE, NLL), (x(4, 3).long(), t()), {}, ["torch.int64", "not implemented for"]),
    "bool input": ((CE, NLL), (x(4, 3).bool(), t()), {}, ["torch.bool", "not implemented for"]),
    "0-d input": ((CE,), (x(1).view(()), t(1).view(())), {}, ["input"]),
    "0-d input, nll": ((NLL,), (x(1).view(()), t(1).view(())), {}, ["Expected 1 or more dimensions (got 0)"]),
    "0-d input, float target": ((CE,), (x(1).view(()), x(1).view(())), {}, ["dimension"]),
    "weight size": (
        (CE, NLL),
        (x(), t()),
        {"weight": x(4)},
        ["weight tensor should be defined either for all 3 classes", "[4]"],
    ),
    "weight dimensions": ((CE, NLL), (x(), t()), {"weight": x(1, 3)}, ["all 3 classes", "[1, 3]"]),
    "weight size, probabilities": (
        (CE,),
        (x(), x().softmax(1)),
        {"weight": x(2)},
        ["cross_entropy: weight tensor should be defined either for all 3 classes", "[2]"],
    ),
    "weight that requires grad": (
        (CE, NLL),
        (x().requires_grad_(), t()),
        {"weight": torch.ones(3, requires_grad=True)},
        ["not differentiable with respect to argument 'weight'", "detach"],
    ),
    "reduction": ((CE, NLL), (x(), t()), {"reduction": "nope"}, ["nope is not a valid value for reduction"]),
    "reduction None": ((CE, NLL), (x(), t()), {"reduction": None}, ["None is not a valid value for reduction"]),
    "smoothing above": ((CE,), (x(), t()), {"label_smoothing": 1.5}, ["between 0.0 and 1.0. Got: 1.5"]),
    "smoothing above, probabilities": ((CE,), (x(), x().softmax(1)), {"label_smoothing": 1.5}, ["Got: 1.5"]),
    "smoothing not a number": ((CE,), (x(), t()), {"label_smoothing": "a"}, ["'label_smoothing'", "str"]),
    "ignore_index with probabilities": (
        (CE,),
        (x(), x().softmax(1)),
        {"ignore_index": 1},
        ["ignore_index is not supported for floating point target", "1"],
    ),
    "ignore_index not an integer": ((CE, NLL), (x(), t()), {"ignore_index": 1.5}, ["'ignore_index'", "float"]),
    "ignore_index bool": ((CE, NLL), (x(), t()), {"ignore_index": True}, ["'ignore_index'", "bool"]),
    "input not a tensor": ((CE, NLL), ([1.0, 2.0], t()), {}, ["'input'", "list"]),
    "target not a tensor": ((CE, NLL), (x(), [0, 1, 2, 0]), {}, ["'target'", "list"]),
    "target None": ((CE, NLL), (x(), None), {}, ["'target'", "NoneType"]),
    "weight float8": (
        (CE, NLL),
        (x(), t()),
        {"weight": torch.ones(3).to(torch.float8_e5m2)},
        ["weight", "float8_e5m2"],
    ),
    "weight complex": (
        (CE, NLL),
        (x(), t()),
        {"weight": torch.ones(3, dtype=torch.complex64)},
        ["weight", "complex64"],
    ),
    "weight of one more dimension, smoothing": (
        (CE,),
        (x(4, 3, 5), t(4, 5)),
        {"weight": x(1, 3), "label_smoothing": 0.1},
        ["weight", "[1, 3]"],
    ),
    "ignore_index too large": ((CE, NLL), (x(), t()), {"ignore_index": 2**63}, ["'ignore_index'", str(2**63)]),
    "ignore_index too small": ((CE, NLL), (x(), t()), {"ignore_index": -(2**63) - 1}, ["'ignore_index'", "-92233"]),
    "reduce ambiguous": ((CE, NLL), (x(), t()), {"reduce": torch.zeros(2)}, ["Boolean value of Tensor"]),
    "no row, float target": ((CE, NLL), (x(0, 3), x(1).view(())), {}, ["expected target dtype to be Long or Byte"]),
    "no class": ((CE, NLL), (x(4, 0, 3), t(4, 3)), {}, ["size mismatch", "[4, 0, 3]", "no classes"]),
    "weight not a tensor": ((CE, NLL), (x(), t()), {"weight": [1.0, 1.0, 1.0]}, ["'weight'", "list"]),
}


@pytest.mark.parametrize(("losses", "arguments", "options", "words"), CASES.values(), ids=CASES)
def test_as_torch(losses, arguments, options, words, device):
    """The same type as torch's exception, and a message that says which argument has which value."""

    def there(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    for ours, theirs in losses:
        with pytest.raises(Exception) as want:
            theirs(*arguments, **options)
        with pytest.raises(type(want.value)) as got:
            ours(*map(there, arguments), **{name: there(value) for name, value in options.items()})
        if device == "cpu":  # torch was asked there; on a GPU it raises subclasses of some of these
            assert type(got.value) is type(want.value)
        for word in words:
            assert word in str(got.value), str(got.value)
        assert "fastloss/" not in str(got.value) and ".cpp" not in str(got.value)


SHAPES = [(), (1,), (4,), (5,), (4, 5), (4, 1), (1, 5), (0, 5), (0, 0), (1, 1), (1, 1, 1), (4, 5, 3), (4, 3)]
SHAPES += [(2, 5, 3, 4), (2, 3, 4), (2, 5, 1, 3, 4), (2, 1, 3, 4), (4, 0, 3), (4, 5, 0), (2, 0, 1, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_first_of_several_errors_is_torchs(shape):
    """Every shape against every shape, with indices and with floats; nll_loss with an input of integers too."""

    def outcome(loss, arguments):
        try:
            return loss(*arguments).shape
        except Exception as error:
            return type(error)

    for target_shape in SHAPES:
        for target_dtype in (torch.long, torch.float32):
            for (ours, theirs), dtype in ((CE, torch.float32), (NLL, torch.float32), (NLL, torch.int32)):
                arguments = torch.zeros(shape, dtype=dtype), torch.zeros(target_shape, dtype=target_dtype)
                if dtype is torch.int32 and arguments[0].numel() == 0:
                    continue  # torch looks at the dtype of elements only where there are some
                want, got = outcome(theirs, arguments), outcome(ours, arguments)
                assert got == want, (target_shape, arguments, got)


ARRAY = x().numpy()
POINTWISE_CASES = {
    "input an array": ("l1 mse smooth_l1 huber", (ARRAY, x()), {}, ["'input'", "ndarray"]),
    "target an array": ("l1 mse smooth_l1 huber", (x(), ARRAY), {}, ["'target'", "ndarray"]),
    "target a list": ("l1 mse smooth_l1 huber", (x(), [1.0]), {}, ["'target'", "list"]),
    "both wrong": ("l1 mse smooth_l1 huber", ([1.0], ARRAY), {}, ["'target'", "ndarray"]),
    "weight an array": ("l1 mse huber", (x(), x()), {"weight": ARRAY}, ["'weight'", "ndarray"]),
    "reduction a list": ("l1 mse smooth_l1 huber", (x(), x()), {"reduction": ["mean"]}, ["['mean']"]),
    "reduction a list, weight": ("l1 mse huber", (x(), x()), {"reduction": ["mean"], "weight": x()}, ["['mean']"]),
    "shapes before weights": ("l1 mse huber", (x(4, 3), x(4, 0)), {"weight": x(4, 0)}, ["[4, 3]", "[4, 0]"]),
    "bool target and weight": ("l1 mse", (x(), x() > 0), {"weight": x()}, ["bool"]),
    "weight float8": ("l1 mse huber", (x(), x()), {"weight": x().to(torch.float8_e5m2)}, ["weight", "float8_e5m2"]),
    "complex target": ("huber", (x(), x().to(torch.complex64)), {}, ["complex64", "torch.float32"]),
    "beta an array": ("smooth_l1", (x(), x()), {"beta": ARRAY[0, 0:1]}, ["'beta'", "ndarray"]),
}


@pytest.mark.parametrize(("losses", "arguments", "options", "words"), POINTWISE_CASES.values(), ids=POINTWISE_CASES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_pointwise_as_torch(losses, arguments, options, words):
    for name in losses.split():
        with pytest.raises(Exception) as want:
            getattr(F, f"{name}_loss")(*arguments, **options)
        with pytest.raises(type(want.value)) as got:
            getattr(fastloss, f"{name}_loss")(*arguments, **options)
        assert type(got.value) is type(want.value)
        for word in words:
            assert word in str(got.value), str(got.value)


TAKEN = {
    "reduce 0": ("cross_entropy nll_loss", (x(), t()), {"reduce": 0}),
    "size_average 0": ("cross_entropy nll_loss", (x(), t()), {"size_average": 0, "reduction": "nope"}),
    "size_average and reduce": ("cross_entropy nll_loss", (x(), t()), {"size_average": 0.0, "reduce": 1}),
    "a target of one element": ("cross_entropy nll_loss", (x(3), t(1)), {"reduction": "none"}),
    "weight of another shape": ("cross_entropy nll_loss", (x(4, 3, 5), t(4, 5)), {"weight": x(1, 3).exp()}),
    "integer weight": ("cross_entropy", (x(), x().softmax(1)), {"weight": torch.arange(3)}),
    "bool weight": ("cross_entropy", (x(), x().softmax(1)), {"weight": torch.arange(3) > 0, "reduction": "none"}),
    "sparse probabilities": ("cross_entropy", (x(), x().softmax(1).to_sparse()), {}),
    "reduce 0, pointwise": ("l1_loss mse_loss smooth_l1_loss", (x(), x() + 1), {"reduce": 0}),
    "nothing, weighted": ("l1_loss mse_loss", (x(1, 3), x(0, 3)), {"weight": x(1, 3)}),
    "weight of fewer dimensions": (
        "huber_loss l1_loss",
        (x(1, 1, dtype=torch.bfloat16), x(2, 2, 3, dtype=torch.bfloat16)),
        {"weight": x(1, 1), "reduction": "sum"},
    ),
}


@pytest.mark.parametrize(("losses", "arguments", "options"), TAKEN.values(), ids=TAKEN)
@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:Using a target size")
def test_unusual_arguments_that_torch_takes(losses, arguments, options):
    for name in losses.split():
        want = getattr(F, name)(*arguments, **options)
        got = getattr(fastloss, name)(*arguments, **options)
        torch.testing.assert_close(got, want, rtol=2e-2 if arguments[0].dtype is torch.bfloat16 else 1e-5, atol=1e-6)


OURS = {
    "label_smoothing negative": ({"label_smoothing": -0.1}, RuntimeError, ["label_smoothing", "Got: -0.1"]),
    "softcap 0": ({"softcap": 0.0}, ValueError, ["softcap", "0.0"]),
    "softcap negative": ({"softcap": -2.0}, ValueError, ["softcap", "-2.0"]),
    "softcap nan": ({"softcap": NAN}, ValueError, ["softcap", "nan"]),
    "softcap not a number": ({"softcap": "3"}, TypeError, ["softcap"]),
    "z_loss negative": ({"z_loss": -1.0}, ValueError, ["z_loss", "-1.0"]),
    "z_loss nan": ({"z_loss": NAN}, ValueError, ["z_loss", "nan"]),
    "z_loss not a number": ({"z_loss": "a"}, TypeError, ["'z_loss'", "str"]),
    "logit_scale not a number": ({"logit_scale": None}, TypeError, ["'logit_scale'"]),
    "logit_scale that requires grad": (
        {"logit_scale": torch.ones((), requires_grad=True)},
        TypeError,
        ["'logit_scale'", "requires grad", "detached"],
    ),
    "all_ignored": ({"all_ignored": "none"}, ValueError, ["all_ignored", "'none'", "'zero'"]),
    "zero_times_inf": ({"zero_times_inf": True}, ValueError, ["zero_times_inf", "True"]),
    "class_dim": ({"class_dim": 2}, IndexError, ["class_dim is 2", "2 dimensions"]),
    "class_dim negative": ({"class_dim": -3}, IndexError, ["class_dim is -3"]),
    "class_dim not an integer": ({"class_dim": 0.5}, TypeError, ["class_dim"]),
    "sample_weight shape": ({"sample_weight": torch.ones(3)}, ValueError, ["sample_weight", "[4]", "[3]"]),
    "sample_weight of the input's shape": (
        {"sample_weight": torch.ones(4, 3)},
        ValueError,
        ["sample_weight", "[4, 3]"],
    ),
    "sample_weight integer": (
        {"sample_weight": torch.ones(4, dtype=torch.long)},
        RuntimeError,
        ["sample_weight", "int64"],
    ),
    "sample_weight that requires grad": (
        {"sample_weight": torch.ones(4, requires_grad=True)},
        RuntimeError,
        ["sample_weight", "detached"],
    ),
    "sample_weight not a tensor": ({"sample_weight": [1.0] * 4}, TypeError, ["'sample_weight'", "list"]),
    "weight integer": ({"weight": torch.ones(3, dtype=torch.long)}, RuntimeError, ["weight", "int64", ".float()"]),
}


@pytest.mark.parametrize(("options", "kind", "words"), OURS.values(), ids=OURS)
def test_options_beyond_torch(options, kind, words, device):
    options = {
        k: v.detach().to(device).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    with pytest.raises(kind) as error:
        fastloss.cross_entropy(x().to(device), t().to(device), **options)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_class_dim_of_one_sample(device):
    with pytest.raises(IndexError, match="class_dim is 1"):
        fastloss.cross_entropy(x(5).to(device), t(1).view(()).to(device), class_dim=1)


def test_nll_loss_refuses_a_weight_of_another_dtype(device):
    weight = torch.ones(3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"weight.to\(input.dtype\)"):
        fastloss.nll_loss(x().to(device), t().to(device), weight)


def test_modules_raise_the_same():
    with pytest.raises(RuntimeError, match="Got: 1"):
        fastloss.CrossEntropyLoss(label_smoothing=1.5)(x(), t())
    with pytest.raises(ValueError, match="nope"):
        fastloss.NLLLoss(reduction="nope")(x(), t())


# ------------------------------------------------------------------------------------------------- bad targets

INDEX_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip


def bad_values(dtype, classes):
    if dtype == torch.uint64:  # values past int64 have tests of their own
        return [classes, classes + 1, 2**63 - 1]
    info = torch.iinfo(dtype)
    values = [classes, classes + 1, info.max, info.max - 1, *((-1, -99, -101, info.min) if info.min else ())]
    return [v for v in values if info.min <= v <= info.max and not 0 <= v < classes]


def with_value(shape, place, value, dtype, device):
    """Class indices of 0 but for one."""
    if dtype == torch.uint64 and value >= 2**63:
        value -= 2**64  # the same bits
        target = torch.zeros(shape, dtype=torch.int64)
        target[place] = value
        return target.view(torch.uint64).to(device)
    target = torch.zeros(shape, dtype=torch.int64)
    target[place] = value
    return target.to(dtype).to(device)


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_bad_target(dtype, device, immediate_errors):
    """Every integer dtype's limits, in rows and in images; the message says where and what."""
    for input, shape, place in (
        (x(6, 7), (6,), (4,)),
        (x(6, 7).t().contiguous().t(), (6,), (5,)),
        (x(300, 10), (300,), (299,)),
        (x(2, 2000), (2,), (1,)),
        (x(2, 7, 5), (2, 5), (1, 3)),
        (x(2, 7, 4, 5), (2, 4, 5), (1, 2, 3)),
        (x(2, 7, 4, 5).contiguous(memory_format=torch.channels_last), (2, 4, 5), (0, 3, 4)),
        (x(2, 7, 2, 3, 4), (2, 2, 3, 4), (1, 1, 2, 3)),
    ):
        for value in bad_values(dtype, input.shape[1]):
            target = with_value(shape, place, value, dtype, device)
            for function, options in (
                (fastloss.cross_entropy, {}),
                (fastloss.cross_entropy, {"reduction": "none", "label_smoothing": 0.1}),
                (fastloss.nll_loss, {}),
                (fastloss.nll_loss, {"reduction": "none"}),
            ):
                for requires_grad in (False, True):
                    leaf = input.to(device).detach().requires_grad_(requires_grad)
                    before = leaf.detach().clone()
                    with pytest.raises(IndexError) as error:
                        function(leaf, target, **options)
                    message = str(error.value)
                    shown = value if value < 2**63 else value - 2**64
                    assert f"Target {shown} is out of bounds." in message
                    if device == "cpu":
                        assert f"target[{', '.join(map(str, place))}] = {shown}" in message, message
                        assert f"{input.shape[1]} classes" in message and "ignore_index" in message
                    assert torch.equal(leaf, before) and leaf.grad is None


def test_uint64_beyond_int64_is_named_by_its_own_value(immediate_errors):
    target = with_value((4,), (2,), 2**64 - 1, torch.uint64, "cpu")
    with pytest.raises(IndexError, match="18446744073709551615"):
        fastloss.cross_entropy(x(), target)


def test_uint64_beyond_int64_is_not_taken_for_ignore_index(device, immediate_errors):
    """2**64 - 100 has the bits of -100."""
    target = with_value((4,), (2,), 2**64 - 100, torch.uint64, device)
    with pytest.raises(IndexError):
        fastloss.cross_entropy(x().to(device), target)


def test_the_default_ignore_index_is_bad_where_another_is_set(device, immediate_errors):
    target = torch.tensor([0, -100, 1, 2], device=device)
    for ours, theirs in (CE, NLL):
        ours(x().to(device), target)
        with pytest.raises(IndexError, match="-100"):
            ours(x().to(device), target, ignore_index=-1)
        if device == "cpu":
            with pytest.raises(IndexError, match="-100"):
                theirs(x(), target, ignore_index=-1)


def test_ignore_index_beyond_the_dtype_of_the_target_ignores_nothing(device, immediate_errors):
    """-100 is no uint8, 255 no int8: no value is mistaken for it."""
    input = x(3, 200).to(device)
    target = torch.tensor([156, 3, 4], device=device).to(torch.uint8)  # 156 is -100 in 8 bits
    torch.testing.assert_close(
        fastloss.cross_entropy(input, target), F.cross_entropy(input, target.long(), ignore_index=-100)
    )
    with pytest.raises(IndexError):
        fastloss.cross_entropy(input, torch.tensor([-1, 3, 4], device=device).to(torch.int8), ignore_index=255)


def test_first_bad_target_of_several_is_named(immediate_errors):
    """Deterministically, whatever the threads."""
    target = torch.zeros(100_000, dtype=torch.long)
    target[[777, 50_000, 99_999]] = torch.tensor([12, 13, 14])
    for _ in range(5):
        with pytest.raises(IndexError, match=r"target\[777\] = 12"):
            fastloss.cross_entropy(x(100_000, 10), target)
        with pytest.raises(IndexError, match=r"target\[777\] = 12"):
            fastloss.nll_loss(x(100_000, 10), target)


def test_bad_target_of_one_sample(device, immediate_errors):
    for target in (torch.tensor(3, device=device), torch.tensor([3], device=device)):
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            fastloss.cross_entropy(x(3).to(device), target)


def test_no_class_is_a_good_target_without_classes(device, immediate_errors):
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        fastloss.cross_entropy(torch.randn(2, 0, device=device), t(2).to(device))


def test_a_target_changed_before_backward_is_noticed(device):
    """The recomputing path reads the target again."""
    leaf, target = x().to(device).requires_grad_(), t().to(device)
    loss = fastloss.cross_entropy(leaf, target, reduction="none")
    target.fill_(99)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("loss", [fastloss.cross_entropy, fastloss.nll_loss])
@pytest.mark.parametrize("classes", [5, 200])
def test_a_target_changed_behind_autograds_back_touches_nothing(loss, classes):
    """Memory shared with numpy has no version counter; torch's own backward reads out of bounds here."""
    target = torch.zeros(7, dtype=torch.long)
    shared = target.numpy()
    for value in (classes, -1, 10**12, -(10**12)):
        shared[:] = 0
        logits = torch.randn(7, classes, requires_grad=True)
        result = loss(logits, target, torch.ones(classes), reduction="none").sum()
        shared[2:] = value
        result.backward()
        assert logits.grad[2:].count_nonzero() == 0
        assert logits.grad[:2].count_nonzero() > 0


# ------------------------------------------------------------------------------------------------------ devices


def test_mixed_devices_are_both_named(device):
    other = "meta" if device == "cpu" else "cpu"
    for arguments, options, name in (
        ((x().to(device), t().to(other)), {}, "target"),
        ((x().to(device), t().to(device)), {"weight": torch.ones(3, device=other)}, "weight"),
        ((x().to(device), t().to(device)), {"sample_weight": torch.ones(4, device=other)}, "sample_weight"),
    ):
        with pytest.raises(RuntimeError, match="same device") as error:
            fastloss.cross_entropy(*arguments, **options)
        for word in ("input is on", str(arguments[0].device), f"{name} is on", other):
            assert word in str(error.value)


def test_unsupported_tensors_say_what_to_do():
    for input, words in (
        (x().to_sparse(), ["layout", "to_dense"]),
        (x().to(torch.complex64), ["complex64"]),
        (x().to(torch.float8_e4m3fn), ["float8_e4m3fn"]),
        (torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8), ["qint8"]),
    ):
        with pytest.raises(NotImplementedError) as error:
            fastloss.cross_entropy(input, t())
        for word in words:
            assert word in str(error.value)


# -------------------------------------------------------------------------------- what a GPU finds, it says later


@pytest.fixture
def gpu(device):
    if device != "cuda":
        pytest.skip("the CPU raises in the call itself")


def test_error_mode_of_bad_names():
    with pytest.raises(ValueError, match="'deferred' or 'immediate'"):
        fastloss.set_error_mode("later")
    fastloss.check_errors()  # nothing to say


def test_deferred_error(gpu, device):
    """nan and zero gradient in the bad row; then one IndexError; then nothing, and the GPU works on."""
    leaf, target = x(50, 100).to(device).requires_grad_(), t(50).to(device)
    target[7], target[9] = 100, -5
    loss = fastloss.cross_entropy(leaf, target, reduction="none")
    torch.cuda.synchronize()
    assert loss.isnan().nonzero().flatten().tolist() == [7, 9]
    with pytest.raises(IndexError, match=r"Target (100|-5) is out of bounds.*row (7|9)"):
        fastloss.check_errors()
    fastloss.check_errors()
    assert torch.ones(3, device=device).sum().item() == 3
    good = fastloss.cross_entropy(leaf, t(50).to(device))
    torch.testing.assert_close(good, F.cross_entropy(leaf, t(50).to(device)))


def test_deferred_error_raises_at_the_next_call(gpu, device):
    leaf, target = x(50, 100).to(device), t(50).to(device)
    fastloss.cross_entropy(leaf, target + 100)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="Target 100 is out of bounds"):
        fastloss.cross_entropy(leaf, target)
    fastloss.cross_entropy(leaf, target)


def test_deferred_error_leaves_other_rows_alone(gpu, device):
    """The sum over the good rows has their gradient; a bad row's is zero."""
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"reduction": "sum", "grad_in_forward": False}):
        leaf, target = x(50, 100).to(device).requires_grad_(), t(50).to(device)
        bad = target.clone()
        bad[7] = 2**62
        loss = fastloss.cross_entropy(leaf, bad, **options)
        torch.cuda.synchronize()
        with pytest.raises(IndexError):
            fastloss.check_errors()
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if options["reduction"] == "sum" else None
        if grad is None:
            (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        torch.cuda.synchronize()
        with suppress(IndexError):  # backward may or may not report the row again
            fastloss.check_errors()
        want = torch.autograd.grad(F.cross_entropy(leaf, target, reduction="sum"), leaf)[0]
        want[7] = 0
        torch.testing.assert_close(grad, want)


def test_a_good_call_does_not_wait_for_the_gpu(gpu, device):
    """torch's detector of synchronisations stays silent."""
    leaf, target = x(50, 100).to(device).requires_grad_(), t(50).to(device)
    hidden, weight = x(50, 16).to(device).requires_grad_(), x(100, 16).to(device).requires_grad_()
    fastloss.cross_entropy(leaf, target).backward()
    fastloss.linear_cross_entropy(hidden, weight, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"return_stats": True}):
            result = fastloss.cross_entropy(leaf, target, **options)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
            result = fastloss.linear_cross_entropy(hidden, weight, target, memory_budget=1 << 12, **options)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("head", (False, True), ids=("logits", "head"))
def test_cuda_graph(head, gpu, device):
    """Captured once, replayed with other data; of a head, chunk by chunk."""
    leaf, target = x(64, 32 if head else 1000).to(device).requires_grad_(), t(64).to(device)
    weight = x(1000, 32).to(device) if head else None

    def loss_of(leaf):
        if head:
            return fastloss.linear_cross_entropy(leaf, weight, target, memory_budget=1 << 16)
        return fastloss.cross_entropy(leaf, target)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            leaf.grad = None
            loss_of(leaf).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    leaf.grad = None
    with torch.cuda.graph(graph):
        loss = loss_of(leaf)
        loss.backward()
    leaf.data.normal_()
    graph.replay()
    torch.cuda.synchronize()
    other = leaf.detach().clone().requires_grad_()
    want = F.cross_entropy(other if weight is None else other @ weight.t(), target)
    want.backward()
    torch.testing.assert_close(loss.detach(), want.detach())
    torch.testing.assert_close(leaf.grad, other.grad)


# ---------------------------------------------------------------------------- the operators defend themselves too


def test_operators_refuse_wrong_arguments():
    """They are private, but wrong pointers would be worse than wrong results."""
    good = (x(), t(), 1, 0, 0, None, None, None, -100, 0.0, 0.0, 0.0, 1.0, 0, [])
    ops.cross_entropy_forward(*good)
    wrong = (1, t(5)), (5, torch.ones(2)), (5, torch.ones(3).double()), (6, torch.ones(5)), (7, torch.ones(()))
    for place, value in (*wrong, (3, 9), (13, 9)):
        bad = list(good)
        bad[place] = value
        with pytest.raises((RuntimeError, ValueError)):
            ops.cross_entropy_forward(*bad)
    with pytest.raises((RuntimeError, ValueError)):
        ops.cross_entropy_backward(torch.ones(()), torch.ones(3), *good)
    with pytest.raises((RuntimeError, ValueError)):
        ops.scale_grad(x(), torch.ones(2))


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (fastloss.cross_entropy, "class_dim=-1"),
        (fastloss.focal_loss, "class_dim=-1"),
        (fastloss.poly1_loss, "class_dim=-1"),
        (fastloss.arcface_loss, "class_dim=-1"),
        (fastloss.capsule_margin_loss, r"input\.movedim\(-1, 1\)"),
        (fastloss.tversky_loss, r"input\.movedim\(-1, 1\)"),
        (fastloss.dice_ce_loss, r"input\.movedim\(-1, 1\)"),
        (fastloss.nll_loss, r"input\.movedim\(-1, 1\)"),
    ],
)
@pytest.mark.parametrize("shape", ((2, 7, 5), (2, 3, 4, 5)))
def test_classes_in_the_last_dimension(loss, remedy, shape, device):
    """Logits of a language model: (N, T, V), labels (N, T)."""
    x, t = torch.randn(shape, device=device), torch.zeros(shape[:-1], dtype=torch.long, device=device)
    with pytest.raises(RuntimeError, match=remedy):
        loss(x, t)
    with pytest.raises(RuntimeError) as error:
        loss(x, t[..., :2])
    assert "last dimension" not in str(error.value)
