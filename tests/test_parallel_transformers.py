"""A Llama of transformers under its own tensor and data parallelism, without a change: the curve of one process."""

import os

import fastloss
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

pytest.importorskip("transformers", minversion="5.18", reason="transformers with tensor parallelism on DTensors")
pytest.importorskip("safetensors", reason="safetensors, for what transformers loads")

STEPS, SAMPLES, LENGTH, CLASSES = 4, 4, 7, 41  # two ranks have 21 and 20 classes


def config(heads=2):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=CLASSES, num_key_value_heads=heads, max_position_embeddings=32, **sizes)


def batch(step):
    """Tokens and labels; ranks have different numbers of labels."""
    g = torch.Generator().manual_seed(step % 2)
    tokens = torch.randint(CLASSES, (SAMPLES, LENGTH), generator=g)
    labels = tokens.clone()
    for row in range(SAMPLES):
        labels[row, LENGTH - row :] = -100
    return tokens, labels


def train(model, part=slice(None), group=None):
    """The loss of each step. The model's own loss is a share of the mean over all labels (num_items_in_batch)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    curve = []
    for step in range(STEPS):
        tokens, labels = batch(step)
        count = (labels[:, 1:] != -100).sum()
        ranks = 1 if group is None else torch.distributed.get_world_size(group)
        loss = model(input_ids=tokens[part], labels=labels[part], num_items_in_batch=count).loss
        (loss * ranks).backward()  # FSDP averages
        share = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().clone()
        if group is not None:
            torch.distributed.all_reduce(share, group=group)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(share.item())
    return curve


def curves(rank, group, path, plan):
    """Tensor parallel 2 x data parallel 2 with the patch, and the untouched model in one process with torch's loss."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(rank)
    parallel = DistributedConfig(tp_plan=plan, tp_size=2, fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=parallel).train()
    assert isinstance(model.lm_head.weight, DTensor)
    data = model._device_mesh["fsdp"]
    here = slice(data.get_local_rank(), None, 2)
    with fastloss.patch(), loss_parallel():
        curve = train(model, here, data.get_group())
        report = fastloss.patch_report()
    alone = train(AutoModelForCausalLM.from_pretrained(path).train()) if rank == 0 else None
    return curve, dict(report.served), alone


def lazy_curves(rank, group, path):
    """Tensor parallel 4: the loss from hidden states and shards of the head's weight."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(rank)
    parallel = DistributedConfig(tp_plan="auto", tp_size=2, dp_replicate_size=1, fsdp_size=2)
    with pytest.raises(NotImplementedError, match="fully_shard on its own"):  # transformers shards head and norm as one
        fastloss.lazy_head(AutoModelForCausalLM.from_pretrained(path, distributed_config=parallel))
    parallel = DistributedConfig(tp_plan="auto", tp_size=4)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=parallel).train()
    own = model.lm_head.forward
    fastloss.lazy_head(model)
    curve = train(model)
    report = fastloss.lazy_head.report(model)
    assert report.fused and report.losses == 1, report
    model.eval()
    with torch.no_grad():
        assert type(model(input_ids=batch(0)[0]).logits) is torch.Tensor
    assert fastloss.restore_head(model).lm_head.forward is own
    return curve, train(AutoModelForCausalLM.from_pretrained(path).train()) if rank == 0 else None


def test_a_lazy_head_on_a_tensor_parallel_llama(team, tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(config(heads=4)).save_pretrained(tmp_path)
    found = team.run(lazy_curves, 4, str(tmp_path))
    for curve, _ in found:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(found[0][1]), rtol=1e-4, atol=1e-4)


def test_a_llama_trains_to_the_curve_of_one_process(team, tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    found = team.run(curves, 4, str(tmp_path), "auto")
    alone = found[0][2]
    assert alone[-1] < alone[0] - 0.2  # it learns
    for curve, served, _ in found:
        assert served == {"cross_entropy": STEPS}
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(alone), rtol=1e-4, atol=1e-4)
