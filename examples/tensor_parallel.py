"""Trains a small Llama-like model over tensor parallelism x data parallelism, and once more in one process.

    torchrun --standalone --nproc-per-node 4 examples/tensor_parallel.py                  # CPU, gloo
    torchrun --standalone --nproc-per-node 4 examples/tensor_parallel.py --device cuda    # a GPU for each, NCCL

The mesh has two dimensions. Over ``tp`` the layers are split by torch's parallelize_module, and the head leaves its
logits sharded over the classes: a DTensor, which fastloss.cross_entropy takes as it is. Over ``dp`` each rank has its
own samples, and FSDP2 averages the gradients. Samples are padded, so that ranks have different numbers of targets: the
mean is over the targets of all ranks and of all micro-batches of the step, which fastloss.parallel.count counts.

Rank 0 then trains the same model alone, on the samples of all ranks, and prints both curves.
"""

import argparse
import os

import fastloss
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

VOCABULARY, WIDTH, HEADS, LENGTH = 203, 32, 4, 12  # a vocabulary that no mesh divides
MICRO_BATCHES, SAMPLES = 2, 4  # of a step; samples of a micro-batch, of all ranks together


class Layer(nn.Module):
    """Attention and a gated MLP; the number of heads follows from what this rank has of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[samples, tokens, WIDTH]"""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[samples, tokens] to [samples, tokens, VOCABULARY]"""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def split(model: Model, mesh: DeviceMesh) -> Model:
    """Over ``tp`` and ``dp``; the head leaves its logits where they are."""
    columns, rows = ColwiseParallel, RowwiseParallel
    layer = {"q": columns(), "k": columns(), "v": columns(), "gate": columns(), "up": columns()}
    for each in model.layers:
        parallelize_module(each, mesh["tp"], layer | {"o": rows(), "down": rows()})
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh["tp"], {"head": head})
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh["dp"])
    return model


def batches(step: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of (tokens, labels) of all ranks, of three steps in turn, so that they can be learnt."""
    g = torch.Generator().manual_seed(step % 3)
    found = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=g)
        labels = tokens[:, 1:].clone()
        for row, length in enumerate(torch.randint(2, LENGTH + 1, (SAMPLES,), generator=g)):
            labels[row, length:] = -100
        found.append((tokens[:, :-1].to(device), labels.to(device)))
    return found


def train(steps: int, device: torch.device, mesh: DeviceMesh | None = None) -> list[float]:
    """The loss of each step; without a mesh, of one process."""
    torch.manual_seed(0)
    model = Model().to(device)
    group, rank, ranks = None, 0, 1
    if mesh is not None:
        model = split(model, mesh)
        group = mesh["dp"].get_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    curve = []
    for step in range(steps):
        mine = [(tokens[rank::ranks], labels[rank::ranks]) for tokens, labels in batches(step, device)]
        labels_of_step = torch.cat([labels for _, labels in mine])
        targets = (labels_of_step != -100).sum() if group is None else fastloss.parallel.count(labels_of_step, group)
        total = torch.zeros((), device=device)
        for tokens, labels in mine:
            logits = model(tokens)
            # This rank's share of the mean over all targets of the step.
            loss = fastloss.cross_entropy(logits.flatten(0, 1), labels.flatten(), normalizer=targets)
            loss = loss if mesh is None else loss.to_local()
            (loss * ranks).backward()  # FSDP averages over the ranks
            total += loss.detach()
        if group is not None:
            dist.all_reduce(total, group=group)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total.item())
    return curve


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share a copy of the model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    ranks = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh(options.device, (ranks // options.tp, options.tp), mesh_dim_names=("dp", "tp"))
    curve = train(options.steps, device, mesh)
    if dist.get_rank() == 0:
        alone = train(options.steps, device)
        print(f"{'step':>4}  {ranks // options.tp} x {options.tp} ranks  one process")
        for step, (a, b) in enumerate(zip(curve, alone, strict=True)):
            print(f"{step:4}  {a:11.6f}  {b:11.6f}")
        apart = max(abs(a - b) for a, b in zip(curve, alone, strict=True))
        print(f"at most {apart:.1e} apart")
        if apart > 1e-3:
            raise SystemExit("the curves differ")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
