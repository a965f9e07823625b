"""TRL's SFTTrainer with a lazy head: the untouched loss curve, with and without lazy log-softmax; what it makes."""

import contextlib
import copy
import warnings

import fastloss
import pytest
import torch
from test_lazy_head import Large, assert_log_probs_as_picked

trl = pytest.importorskip("trl", minversion="1", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers", minversion="5")
tokenizers = pytest.importorskip("tokenizers")
from test_lazy_head_models import CLASSES, TRAINING, build  # noqa: E402

# Later ones never call the head, but for label smoothing, and have large tensors of their own.
OWN_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")
LENGTH, ROWS = 300, 4  # more tokens than TRL's own chunks of 256
CHUNKS = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)


def examples():
    generator = torch.Generator().manual_seed(0)
    for i in range(ROWS):
        ids = torch.randint(3, CLASSES, (LENGTH,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100 if at < 40 * (i % 3) else token for at, token in enumerate(ids)]}


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, CLASSES)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def curve(model, folder, options, training):
    """Loss, entropy and accuracy of each step, taken within ``training``, and of an evaluation."""
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_eval_batch_size=2,
        max_steps=3,
        bf16=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **TRAINING,
        **options,
    )
    rows = datasets.table.InMemoryTable.from_pylist(list(examples()))
    data = datasets.Dataset(rows, fingerprint="examples")  # some versions of dill cannot make one
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())
    with training:
        trainer.train()
    names = ("loss", "entropy", "mean_token_accuracy")
    steps = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    found = trainer.evaluate()
    return [*steps, [found[f"eval_{name}"] for name in names]]


@pytest.mark.parametrize(
    "options", ({}, {"loss_type": "nll"}, {"label_smoothing_factor": 0.1, "loss_type": "nll"}), ids=str
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_loss_curve_is_the_untouched_ones(options, tmp_path):
    """With lazy log-softmax and without; no logits are made of a lazy head's, nor is there a warning of them."""
    plain = build("CausalLM", max_position_embeddings=512)
    want = curve(copy.deepcopy(plain), tmp_path, options, contextlib.nullcontext())
    assert len(want) == 4 and want[2][0] < want[0][0]
    for patch in (contextlib.nullcontext(), fastloss.patch(log_softmax=True)):
        lazy = fastloss.lazy_head(copy.deepcopy(plain), options=CHUNKS)
        logits = Large(2 * (LENGTH - 1) * CLASSES)
        with patch, warnings.catch_warnings():
            warnings.simplefilter("error", fastloss.LazyHeadWarning)
            got = curve(lazy, tmp_path, options, logits)
        assert OWN_HEAD or logits.found == []
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_log_probabilities_of_grpo(dtype):
    assert_log_probs_as_picked(trl.trainer.utils.selective_log_softmax, dtype)
