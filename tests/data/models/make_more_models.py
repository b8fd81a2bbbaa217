"""More families and settings, made as `make_models.py` makes its own: python make_more_models.py OUTDIR [CASE...]"""

import subprocess
import sys

import make_models
import transformers as tf
from peft import TaskType

TINY = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
QUIET = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
LORA = {"r": 4, "lora_alpha": 8}


def roberta():
    """Positions begin behind padding; a head of two layers."""
    config = tf.RobertaConfig(
        **TINY,
        **QUIET,
        num_attention_heads=3,
        max_position_embeddings=34,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=3,
    )
    return tf.RobertaForSequenceClassification(config)


def distilbert():
    """Other names, no token types."""
    config = tf.DistilBertConfig(
        vocab_size=97, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=32, num_labels=3,
        dropout=0, attention_dropout=0, seq_classif_dropout=0,
    )  # fmt: skip
    return tf.DistilBertForSequenceClassification(config)


def qwen2():
    """Biases of queries, keys and values; head and table are one."""
    config = tf.Qwen2Config(
        **TINY, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    )  # fmt: skip
    return tf.Qwen2ForCausalLM(config)


def gpt2(kind=tf.GPT2LMHeadModel):
    """Weights stored (in, out), learnt positions, one projection for queries, keys and values."""
    config = tf.GPT2Config(
        vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return kind(config)


def bottleneck(**more):
    """ResNet's layers of three convolutions."""
    config = tf.ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[2, 2],
        layer_type="bottleneck",
        num_labels=3,
        **more,
    )
    return tf.ResNetForImageClassification(config)


def llama_classes():
    """A classification that reads the last token."""
    config = tf.LlamaConfig(
        **TINY, num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, num_labels=3,
        pad_token_id=0, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    return tf.LlamaForSequenceClassification(config)


CLM = {"task_type": TaskType.CAUSAL_LM}
CLS = {"task_type": TaskType.SEQ_CLS}
make_models.CASES = {
    "roberta_cls": (roberta, dict(**LORA, **CLS, target_modules=["query", "value", "output.dense"]), "cls1"),
    "distilbert_cls": (distilbert, dict(**LORA, **CLS, target_modules=["q_lin", "v_lin", "lin1"]), "cls"),
    "qwen2_clm_tied": (
        qwen2,
        dict(
            **LORA, **CLM, target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True,
        ),
        "clm",
    ),
    "gpt2_clm": (gpt2, dict(**LORA, **CLM, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), "clm"),
    "gpt2_cls": (
        lambda: gpt2(tf.GPT2ForSequenceClassification),
        dict(**LORA, **CLS, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True),
        "cls",
    ),
    "llama_clm_head": (
        lambda: make_models.llama(attention_bias=True, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
        dict(
            **LORA, **CLM, target_modules=["o_proj", "gate_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"],
        ),
        "clm",
    ),
    "llama_cls": (llama_classes, dict(**LORA, **CLS, target_modules=["q_proj", "k_proj", "up_proj"]), "cls"),
    "resnet_bottleneck": (
        bottleneck, dict(**LORA, target_modules=["convolution"], modules_to_save=["classifier.1"]), "img20",
    ),
    "resnet_early": (
        lambda: bottleneck(downsample_in_bottleneck=True, downsample_in_first_stage=True),
        dict(
            r=2, lora_alpha=2, target_modules=["layer.0.convolution", "shortcut.convolution"],
            modules_to_save=["classifier"],
        ),
        "img24",
    ),
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) == 3:
        make_models.make(sys.argv[2], sys.argv[1])
    else:
        for name in sys.argv[2:] or make_models.CASES:
            subprocess.run([sys.executable, __file__, sys.argv[1], name], check=True)
