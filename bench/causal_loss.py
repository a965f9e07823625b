"""What ``compute_loss_func`` saves a transformers Trainer: the loss of bfloat16 logits, forward and backward.

Three ways from the same logits: the loss of transformers (shift, float32 copy, cross entropy) with torch and under
``fastloss.patch()``, and ``fastloss.integrations.transformers.compute_loss_func``. They take turns.

    python bench/causal_loss.py --threads 2          # the table of docs/howto/transformers.md
"""

import argparse
from types import SimpleNamespace

import fastloss
import torch
from fastloss.integrations.transformers import compute_loss_func
from measure import Clock, environment, interleaved, median
from torch import Tensor
from torch.nn import functional as F


def of_transformers(logits: Tensor, labels: Tensor) -> Tensor:
    """As ``ForCausalLMLoss`` of transformers 5 writes it."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), shifted.view(-1), ignore_index=-100)


def patched(logits: Tensor, labels: Tensor) -> Tensor:
    with fastloss.patch():
        return of_transformers(logits, labels)


def handed_over(logits: Tensor, labels: Tensor) -> Tensor:
    return compute_loss_func(SimpleNamespace(logits=logits), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20, help="of measuring, about")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    labels = torch.randint(arguments.vocabulary, (1, arguments.tokens))
    logits = torch.randn(1, arguments.tokens, arguments.vocabulary).bfloat16().requires_grad_()
    ways = {"torch": of_transformers, "`fastloss.patch()`": patched, "`compute_loss_func`": handed_over}

    clocks, found = [], []
    for loss_of in ways.values():

        def step(x: Tensor, loss_of: object = loss_of) -> Tensor:
            x.grad = None
            loss: Tensor = loss_of(x, labels)  # type: ignore[operator]
            loss.backward()
            return loss

        loss = step(logits).item()
        found.append((loss, logits.grad.clone()))  # type: ignore[union-attr]
        clocks.append(Clock("cpu", [logits], step))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-2, atol=1e-8)
    times = [median(samples) for samples in interleaved(clocks, arguments.seconds)]
    print("| loss of bfloat16 logits | ms | times as fast |\n|---|---|---|")
    for name, seconds in zip(ways, times, strict=True):
        print(f"| {name} | {1000 * seconds:.1f} | {times[0] / seconds:.1f} |")
    machine = environment("cpu", arguments.threads, None)
    print(
        f"\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, load before {machine['load']:.1f}"
    )


if __name__ == "__main__":
    main()
