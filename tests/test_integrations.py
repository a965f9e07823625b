"""fastloss.integrations: the losses as other libraries call them."""

import functools
from types import SimpleNamespace

import pytest
import torch
from fastloss.integrations.transformers import compute_loss_func
from torch.nn import functional as F

BATCH, TOKENS, VOCABULARY = 2, 7, 33


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, TOKENS, VOCABULARY, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    labels[0, :3] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("items", (None, 20, torch.tensor(20)), ids=("mean", "number", "tensor"))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1}, {"ignore_index": 5}), ids=str)
def test_causal_loss_is_torchs_on_shifted_rows(dtype, items, options):
    logits, labels = example(dtype)
    if "ignore_index" in options:
        labels[labels < 0] = 5
    loss = compute_loss_func(SimpleNamespace(logits=logits), labels, num_items_in_batch=items, **options)
    loss.backward()
    wide = logits.detach().double().requires_grad_()
    rows = wide[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
    want = F.cross_entropy(*rows, reduction="mean" if items is None else "sum", **options) / (items or 1)
    want.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-9, atol=0)


def test_causal_loss_of_every_kind_of_output():
    logits, labels = example()
    want = compute_loss_func(SimpleNamespace(logits=logits), labels)
    for outputs in ({"logits": logits}, (logits, None)):
        assert torch.equal(compute_loss_func(outputs, labels), want)


def test_causal_loss_makes_no_copy_of_the_logits():
    logits, labels = example(torch.bfloat16)
    large = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            large.extend(t.dtype for t in made if isinstance(t, torch.Tensor) and t.numel() >= logits.numel())
            return out

    with Sizes():
        compute_loss_func(SimpleNamespace(logits=logits), labels).backward()
    assert large and torch.float32 not in large


@pytest.mark.parametrize(
    ("labels", "message"),
    ((None, "labels is None; give"), (torch.zeros(BATCH, TOKENS - 1, dtype=torch.long), r"labels \(2, 6\)")),
    ids=("none", "shape"),
)
def test_causal_loss_refuses(labels, message):
    with pytest.raises(ValueError, match=message):
        compute_loss_func(SimpleNamespace(logits=example()[0]), labels)


@pytest.mark.parametrize(("dtype", "smoothing"), ((torch.float32, 0.1), (torch.bfloat16, 0.0)), ids=str)
def test_the_trainers_curve(dtype, smoothing, tmp_path):
    """Trainer's own loss, and its label smoother's, with two micro-batches a step of different numbers of targets."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes)
    ids = 3 + (torch.arange(24) + torch.arange(16)[:, None]) % 16
    data = [{"input_ids": row, "labels": row.where(torch.arange(24) >= i, -100)} for i, row in enumerate(ids)]
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        assert outputs.loss is None  # the model computed none
        seen.append(outputs.logits.dtype)
        return functools.partial(compute_loss_func, label_smoothing=smoothing)(outputs, labels, num_items_in_batch)

    def curve(**options):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            label_smoothing_factor=smoothing,
            learning_rate=1e-2,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, **options)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    want, got = curve(), curve(compute_loss_func=loss_of)
    assert len(want) == 4 and want[-1] < want[0] and set(seen) == {dtype}
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1.5e-4)  # Trainer logs four decimals
    tolerance = 1.5e-4 if dtype == torch.float32 else 2e-2  # bfloat16 weights move in steps of 2**-8
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
