"""What a vocabulary-parallel cross entropy costs between GPUs, on paper: one all-gather beside three all-reduces.

    python bench/parallel_model.py                    # the table of docs/parallel.md
    python bench/parallel_model.py --rows 16384 --ranks 8 --nvlink 900e9

Nothing here has been measured. The time of a collective is latency plus bytes by bandwidth, for the better of NCCL's
protocols LL and Simple on a ring (for all-reduces also on a tree), with the constants that NCCL itself chooses by:
src/graph/tuning.cc of NVIDIA/nccl, baseLat, hwLat and the shares of the bandwidth that the protocols have. Bandwidths
are of one direction: 450 GB/s for NVLink 4 (NVIDIA's H100 data sheet: 900 GB/s both ways), 50 GB/s for InfiniBand NDR
(400 Gb/s a port, one port for each GPU, as in DGX H100). All of these are arguments.

A step has, for each group of ranks that share the classes:

- fastloss: an all-gather of 12 bytes a row and rank in forward. The head with its loss also sums the input's gradient;
- three all-reduces of 4 bytes a row (maximum, sum of exponentials, target's logit), as torch's loss_parallel,
  Megatron-Core (two, the second of twice the bytes) and Liger do it. The head has the same sum.

How long they stand beside the work: reading the logits twice and writing their gradient at the memory's bandwidth; for
the head its products at the GPU's rate of matrix products.
"""

import argparse
import math
from dataclasses import dataclass

HEADER = 56  # bytes a rank


@dataclass(frozen=True)
class Fabric:
    """Bandwidths of one direction in bytes/s; GPUs of a node, which NVLink connects."""

    nvlink: float
    network: float
    node: int

    def bandwidth(self, ranks: int) -> float:
        """Of the slowest link of a ring."""
        return self.nvlink if ranks <= self.node else self.network * self._ports(ranks)

    def _ports(self, ranks: int) -> int:
        """Rings that leave a node side by side, a port each."""
        return min(self.node, ranks)


# NCCL's constants in us: (base, step on NVLink, step on the network); share of the ring's bandwidth.
RING = {"LL": ((3.6, 0.47, 2.7), 1 / 4), "Simple": ((8.4, 3.4, 9.6), 1.0)}
TREE = {"LL": ((4.4, 0.52, 5.0), 1 / 4), "Simple": ((0.0, 28.0, 50.0), 0.9)}


def _steps(ranks: int, nodes: int, constants: tuple[float, float, float], steps: int, between: int) -> float:
    base, near, far = constants
    return (base + (steps - between) * near + between * far) * 1e-6


def all_gather(each: float, ranks: int, fabric: Fabric) -> float:
    """Seconds; ``each``: bytes of a rank."""
    nodes = -(-ranks // fabric.node)
    moved = each * (ranks - 1)
    return min(
        _steps(ranks, nodes, constants, ranks - 1, nodes - 1) + moved / (share * fabric.bandwidth(ranks))
        for constants, share in RING.values()
    )


def all_reduce(size: float, ranks: int, fabric: Fabric) -> float:
    """Seconds; ``size``: bytes of the tensor."""
    nodes = -(-ranks // fabric.node)
    moved = 2 * size * (ranks - 1) / ranks
    ring = (
        _steps(ranks, nodes, constants, 2 * (ranks - 1), 2 * (nodes - 1)) + moved / (share * fabric.bandwidth(ranks))
        for constants, share in RING.values()
    )
    local = min(ranks, fabric.node)
    depth = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    tree = (
        _steps(ranks, nodes, constants, 2 * (local - 1 + depth), 2 * depth)
        + 2 * size / (share * fabric.bandwidth(ranks))
        for constants, share in TREE.values()
    )
    return min(*ring, *tree)


def row(ranks: int, o: argparse.Namespace) -> dict[str, float]:
    """Microseconds and megabytes of one step of one group."""
    fabric = Fabric(o.nvlink, o.network, o.node)
    gather = all_gather(HEADER + 12 * o.rows, ranks, fabric)
    three = 3 * all_reduce(4 * o.rows, ranks, fabric)
    logits = o.rows * o.classes / ranks * o.itemsize
    loss = 3 * logits / o.memory  # two reads and a write
    products = 4 * 2 * o.rows * o.features * o.classes / ranks / o.flops
    by_input = all_reduce(o.rows * o.features * o.itemsize, ranks, fabric)
    by_weight = products / 4
    return {
        "gathered MB": 12 * o.rows * (ranks - 1) / 1e6,
        "reduced MB": 3 * 2 * 4 * o.rows * (ranks - 1) / ranks / 1e6,
        "gather us": 1e6 * gather,
        "reduces us": 1e6 * three,
        "loss us": 1e6 * loss,
        "head us": 1e6 * products,
        "sum us": 1e6 * by_input,
        "left us": 1e6 * max(0.0, by_input - by_weight),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 64, 256, 1024], help="that share classes")
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a micro-batch of the group")
    parser.add_argument("--classes", type=int, default=131072)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a logit")
    parser.add_argument("--nvlink", type=float, default=450e9)
    parser.add_argument("--network", type=float, default=50e9, help="of a port")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--memory", type=float, default=3.35e12, help="bytes/s of a GPU's memory (H100 data sheet)")
    parser.add_argument("--flops", type=float, default=600e12, help="of a GPU's products; an assumption")
    o = parser.parse_args()
    print(
        f"{o.rows} rows, {o.classes} classes, {o.features} features, {o.itemsize} bytes a logit; "
        "a model, not a measurement"
    )
    print(
        "| ranks | bytes received, MB: all-gather | three all-reduces | all-gather, us | three all-reduces, us | loss, "
        "us | head, us | sum of the input's gradient, us | of it not hidden, us |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for ranks in o.ranks:
        r = row(ranks, o)
        cells = (f"{r[name]:.2f}" if name.endswith("MB") else f"{r[name]:.0f}" for name in r)
        print(f"| {ranks} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
