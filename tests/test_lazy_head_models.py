"""Lazy heads on the models of transformers, from small random configurations: those of the untouched model, unmade."""

import copy
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fastloss
import pytest
import torch
from fastloss.head.lazy_logits import LazyLogits
from test_lazy_head import Large
from torch.nn import LinearCrossEntropyOptions

transformers = pytest.importorskip("transformers", minversion="5")
transformers.logging.set_verbosity_error()

BATCH, LENGTH, CLASSES = 2, 13, 2003  # more than any other axis, so that nothing but logits is as large
CHUNKS = LinearCrossEntropyOptions(batch_chunk_size=5)
PROBABILITIES = """activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop dropout embd_pdrop
    emb_pdrop embedding_dropout hidden_dropout hidden_dropout_prob layerdrop resid_pdrop summary_last_dropout"""
SIZES = {
    CLASSES: "vocab_size",
    64: "max_position_embeddings n_positions",
    24: "d_ff decoder_ffn_dim dff encoder_ffn_dim ffn_dim ffn_hidden_size hidden_dim intermediate_size "
    "shared_expert_intermediate_size",
    16: "d_model dim embedding_size hidden_size n_embd",
    8: "d_kv head_dim kv_lora_rank moe_intermediate_size q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
    4: "n_routed_experts num_experts num_local_experts",
    2: "decoder_attention_heads decoder_layers encoder_attention_heads encoder_layers n_head n_heads n_layer n_layers "
    "num_attention_heads num_experts_per_tok num_heads num_hidden_layers num_key_value_heads num_layers eos_token_id",
    1: "bos_token_id n_group topk_group",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | dict.fromkeys(
    PROBABILITIES.split(), 0.0
)

CAUSAL = """apertus arcee aria_text bart bert bert-generation biogpt bitnet bloom cohere cohere2 ctrl deepseek_v2
    diffllama ernie4_5 exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss
    granite granitemoe helium hunyuan_v1_dense llama mbart minimax ministral mistral mixtral modernbert-decoder mpt
    nemotron olmo olmo2 olmoe opt pegasus persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe roberta smollm3 stablelm
    starcoder2 xglm"""
ENCODER_DECODER = "bart marian prophetnet t5"
MASKED = "bert camembert deberta-v2 distilbert electra modernbert mpnet roberta xlm-roberta"


def build(kind, name="llama", **changes):
    """A small random model in training mode."""
    config = transformers.CONFIG_MAPPING[name]
    known = {*config().to_dict(), *config.attribute_map}
    config = config(**{k: v for k, v in (SMALL | changes).items() if k in known})
    if kind == "CausalLM":
        config.is_decoder = True
    if kind == "Seq2SeqLM":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config).train()


def data():
    ids = torch.randint(3, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 4:6] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same_step(plain, lazy, **tolerances):
    """Same loss, same gradients, nothing of [tokens, classes]; the logits can be read afterwards."""
    tolerances = tolerances or {"rtol": 1e-4, "atol": 1e-6}
    torch.manual_seed(2)
    want = plain(**data())
    want.loss.backward()
    torch.manual_seed(2)
    with Large(BATCH * (LENGTH - 1) * CLASSES) as large, warnings.catch_warnings():
        warnings.simplefilter("error", fastloss.LazyHeadWarning)
        got = lazy(**data())
        got.loss.backward()
    weights = [list(p.shape) for p in plain.parameters()]
    assert [f for f in large.found if f[1] not in weights and f[1][::-1] not in weights] == []
    torch.testing.assert_close(got.loss, want.loss)
    for (name, p), q in zip(plain.named_parameters(), lazy.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerances)
    assert fastloss.lazy_head.report(lazy).fused
    assert type(got.logits) is LazyLogits and got.logits.shape == want.logits.shape
    with pytest.warns(fastloss.LazyHeadWarning):
        torch.testing.assert_close((got.logits + 0.0).detach(), want.logits.detach(), rtol=1e-4, atol=1e-5)


def pair(*how, **changes):
    plain = build(*how, **changes)
    return plain, fastloss.lazy_head(copy.deepcopy(plain), options=CHUNKS)


@pytest.mark.parametrize("name", CAUSAL.split())
def test_causal_language_models(name):
    assert_same_step(*pair("CausalLM", name))


@pytest.mark.parametrize("name", MASKED.split())
def test_masked_language_models(name):
    assert_same_step(*pair("MaskedLM", name))


@pytest.mark.parametrize("name", ENCODER_DECODER.split())
def test_encoder_decoder_models(name):
    """Most add a bias to the logits."""
    assert_same_step(*pair("Seq2SeqLM", name))


def test_tied_weights_and_gradient_checkpointing():
    plain, lazy = pair("CausalLM", tie_word_embeddings=True)
    assert lazy.lm_head.weight is lazy.model.embed_tokens.weight
    for model in (plain, lazy):
        model.gradient_checkpointing_enable()
    assert_same_step(plain, lazy)


def test_compiled_body():
    plain, lazy = pair("CausalLM")
    lazy.model.compile(backend="aot_eager")
    assert_same_step(plain, lazy)


def test_generation_gets_ordinary_logits():
    plain, lazy = pair("CausalLM")
    ids = data()["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastloss.LazyHeadWarning)
        made = [m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (plain, lazy)]
    assert made[0].tolist() == made[1].tolist()


TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(3, CLASSES, (LENGTH,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.where(torch.arange(LENGTH) >= i % 7, -100)}


@pytest.mark.parametrize(
    "options", ({}, {"label_smoothing_factor": 0.1}, {"bf16": True}), ids=("plain", "smoothed", "bf16")
)
def test_trainer_has_the_untouched_loss_curve(options, tmp_path):
    """Two micro-batches a step, whose losses are divided by num_items_in_batch; evaluation too."""
    pytest.importorskip("accelerate")

    def curve(model):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=6, **TRAINING, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*losses, trainer.evaluate()["eval_loss"]]

    plain, lazy = pair("CausalLM")
    want = curve(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastloss.LazyHeadWarning)
        got = curve(lazy)
    assert len(want) == 7 and want[5] < want[0]
    tolerance = 0.03 if "bf16" in options else 1e-4
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=tolerance, atol=tolerance)


def test_lora_on_the_body():
    peft = pytest.importorskip("peft")
    plain = build("CausalLM")
    plain = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lazy = fastloss.lazy_head(copy.deepcopy(plain), options=CHUNKS)
    assert_same_step(plain, lazy)


@pytest.mark.parametrize(
    "how", ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
)
def test_a_head_that_peft_wraps_is_refused(how):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("CausalLM"), peft.LoraConfig(**how))
    with pytest.raises(NotImplementedError, match="wrapped by PEFT"):
        fastloss.lazy_head(model)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    plain, lazy = pair("CausalLM")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    plain, lazy = accelerator.prepare(plain, lazy)
    losses = []
    for model in (plain, lazy):
        out = model(**data())
        assert out.logits.dtype is torch.float32
        accelerator.backward(out.loss)
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)
    assert fastloss.lazy_head.report(lazy).fused
