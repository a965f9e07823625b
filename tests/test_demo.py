"""The demo runs, says what it did, and its check tells a wrong loss from a differently rounded one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastloss import demo

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is wrong by a factor: the value of a loss of it is right."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.factor * grad_output, None


def losses(value=1.0, gradient=1.0):
    """torch's own formulas, rounded differently from torch's losses; value and gradient wrong by the given factors."""

    def cross_entropy(logits, target, weight):
        log_p = ScaleGradient.apply(logits, gradient).log_softmax(1)
        picked = weight[target]
        return -value * (log_p.gather(1, target[:, None]).squeeze(1) * picked).sum() / picked.sum()

    return SimpleNamespace(
        cross_entropy=cross_entropy,
        rmse_loss=lambda p, t: value * (ScaleGradient.apply(p, gradient) - t).norm() / len(p) ** 0.5,
        l1_loss=lambda p, t: value * F.l1_loss(ScaleGradient.apply(p, gradient), t, reduction="sum") / len(p),
    )


def run(tmp_path, capsys, ours=None, steps=40):
    code = demo.main(["--steps", str(steps), "--gain-steps", "0", "--out", str(tmp_path / "curves.png")], ours)
    return code, capsys.readouterr().out


def test_fastloss_trains_as_torch_does(tmp_path, capsys):
    code, out = run(tmp_path, capsys)
    assert code == 0, out
    for task in ("digits, weighted cross entropy", "diabetes, RMSE", "diabetes, L1"):
        assert out.count(task) >= 2  # in the table of results, and in that of the differences
    assert "DIFFERS" not in out
    for picture in ("curves", "curves-losses", "curves-landscape"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{picture}.png" in out


def test_rounding_is_no_difference(tmp_path, capsys):
    code, out = run(tmp_path, capsys, losses())
    assert code == 0, out


@pytest.mark.parametrize("name", ("cross_entropy", "rmse_loss", "l1_loss"))
def test_one_wrong_loss_is_enough(tmp_path, capsys, name):
    ours = losses()
    setattr(ours, name, getattr(losses(gradient=1.01), name))
    code, out = run(tmp_path, capsys, ours)
    assert code == 1 and out.count("DIFFERS") == 2  # of its task, in both precisions


@pytest.mark.parametrize("wrong", [{"value": 1.01}, {"gradient": 1.01}, {"gradient": 1 + 1e-6}, {"gradient": -1.0}])
def test_a_wrong_loss_is_caught(tmp_path, capsys, wrong):
    code, out = run(tmp_path, capsys, losses(**wrong))
    assert code == 1 and "DIFFERS" in out


def test_nan_is_caught(tmp_path, capsys):
    code, out = run(tmp_path, capsys, losses(value=float("nan")), steps=4)
    assert code == 1 and "DIFFERS" in out


def test_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert demo.main(["--out", str(tmp_path / "curves.png")], losses()) == 2
    assert "fastloss[demo]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--gain-steps", "-1"], "--gain-steps must be 0 or more, got -1"),
        (["--out", "gone/curves.png"], "there is no folder "),
        (["--device", "gpu"], "--device gpu cannot be used here: "),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here: "),
    ],
)
def test_what_cannot_be_is_said_before_any_training(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments, losses())
    printed = capsys.readouterr()
    assert ended.value.code == 2 and said in printed.err and not printed.out
