"""What a step of a linear head with its loss costs on a GPU, on paper: three products, and what stands beside them.

    python bench/head_model.py                    # the table of docs/tuning.md
    python bench/head_model.py --memory 2.4e12 --flops 650e12 --case 8192x4096x151936

Nothing here has been measured with fastloss, which has not run on an H200. The rates are of PyTorch on one (October
2026, one run each): a device-to-device copy moved 4.3 TB/s, read and written; a bfloat16 product of 8192x8192x8192 with
random numbers took 788 TFLOP/s. NVIDIA's data sheet has 4.8 TB/s and 989 TFLOP/s without sparsity. Both are arguments.

The bytes are :func:`traffic`, against which tests/test_head_traffic.py holds the operators that a step calls. A product
takes the time of its arithmetic or of its bytes, whichever is more; the loss and the rounding of the weight's gradient
take the time of their bytes. In the last columns nothing of the sums in float32 is hidden behind the arithmetic.
"""

import argparse
from dataclasses import dataclass

from fastloss.head.chunks import rows_per_chunk

ITEMSIZE, SUM = 2, 4  # bytes of a logit, and of a sum of products
CASES = ("8192x4096x128256", "16384x2048x248320")
BUDGETS = (1 << 30, None)


def flops(rows: int, features: int, classes: int) -> int:
    """Of the three products: logits, gradient by the hidden states, gradient by the weight."""
    return 6 * rows * features * classes


def traffic(rows: int, features: int, classes: int, chunks: int, itemsize: int = ITEMSIZE) -> dict[str, int]:
    """The fewest bytes that a step can read and write, if products are calls of their own."""
    logits, hidden, weight = rows * classes, rows * features, classes * features
    return {
        "logits": 5 * logits * itemsize,  # written by a product, read and written by the loss, read by two products
        "weight": 2 * chunks * weight * itemsize,  # read by two products
        "hidden states": 3 * hidden * itemsize,  # read by two products; their gradient is written
        "sums": (2 * chunks - 1) * weight * SUM,  # written once, then read and written
        "rounding": 0 if itemsize == SUM else weight * (SUM + itemsize),  # of the weight's gradient, at the end
    }


@dataclass(frozen=True)
class Gpu:
    """Bytes/s of a copy, read and written; FLOP/s of products."""

    memory: float
    flops: float


@dataclass(frozen=True)
class Step:
    """Seconds."""

    rows: int  # of a chunk
    chunks: int
    arithmetic: float  # of the products, alone
    products: float
    exposed: float  # the same if the sums are not hidden
    loss: float
    rounding: float


def step(rows: int, features: int, classes: int, budget: int | None, gpu: Gpu) -> Step:
    """Of one forward and backward, in bfloat16, summed up in float32."""
    chunk = rows_per_chunk(rows, features, classes, itemsize=ITEMSIZE, device="cuda", budget=budget)
    chunks = -(-rows // chunk)
    moved = traffic(rows, features, classes, chunks)
    arithmetic = flops(rows, features, classes) / gpu.flops
    of_logits = rows * (classes + features) * ITEMSIZE / gpu.memory  # the logits and hidden states of a product
    with_weight = of_logits + moved["weight"] / 2 / gpu.memory
    sums = moved["sums"] / gpu.memory
    one = arithmetic / 3
    return Step(
        rows=chunk,
        chunks=chunks,
        arithmetic=arithmetic,
        products=2 * max(one, with_weight) + max(one, of_logits + sums),
        exposed=2 * max(one, with_weight) + one + sums,
        loss=2 * rows * classes * ITEMSIZE / gpu.memory,
        rounding=moved["rounding"] / gpu.memory,
    )


def table(cases: list[str], gpu: Gpu) -> list[str]:
    """Its lines."""
    lines = [
        "| rows x features x classes | budget | chunks | arithmetic of the products, ms | loss, ms | rounding, ms "
        "| step, ms | over the arithmetic | sums not hidden, ms | over the arithmetic |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        rows, features, classes = map(int, case.split("x"))
        for budget in BUDGETS:
            s = step(rows, features, classes, budget, gpu)
            beside = s.loss + s.rounding
            ms = [1e3 * t for t in (s.arithmetic, s.loss, s.rounding, s.products + beside, s.exposed + beside)]
            name = "default" if budget is None else f"{budget >> 30} GiB"
            lines.append(
                f"| {case} | {name} | {s.chunks} of {s.rows} rows | {ms[0]:.1f} | {ms[1]:.1f} | {ms[2]:.1f} "
                f"| {ms[3]:.1f} | {ms[3] / ms[0]:.2f} | {ms[4]:.1f} | {ms[4] / ms[0]:.2f} |"
            )
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(CASES), help="rows x features x classes")
    parser.add_argument("--memory", type=float, default=4.3e12, help="bytes/s of a copy, read and written")
    parser.add_argument("--flops", type=float, default=788e12, help="FLOP/s of products of 16 bits")
    o = parser.parse_args()
    print(f"{o.memory / 1e12:g} TB/s, {o.flops / 1e12:g} TFLOP/s; a model, not a measurement")
    print("\n".join(table(o.case, Gpu(o.memory, o.flops))))


if __name__ == "__main__":
    main()
