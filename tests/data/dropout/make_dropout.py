"""Where transformers drops: logits of tiny models in training mode, each dropout replaced by x (1 + p), in float64.

Needs: torch, transformers, numpy.  Usage: python make_dropout.py OUTDIR   (offline, CPU, seconds)
It writes OUTDIR/io.npz: for every case CASE.logits, of the inputs of ../models (for GPT-2 as for Llama), and CASE.config, JSON of what its
config.json says of dropout, a number of its own at each place; and OUTDIR/CASE/base of the cases that no other folder has.
"""
import json, os, shutil, sys
HERE = os.path.dirname(os.path.abspath(__file__)); DATA = os.path.join(HERE, ".."); sys.path.insert(0, os.path.join(DATA, "models"))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
import numpy as np, torch, transformers as tf
from make_models import double_everywhere, randomise

TEXT = tf.AutoModelForSequenceClassification
SIZES = dict(vocab_size=97, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, max_position_embeddings=32, num_labels=3)
HIDDEN = dict(hidden_dropout_prob=.11, attention_probs_dropout_prob=.23)
CASES = {
    "bert": ("models/bert_cls_qv", TEXT, HIDDEN | dict(classifier_dropout=.31)),
    "bert_head": ("models/bert_cls_qv", TEXT, HIDDEN | dict(classifier_dropout=None)),
    "roberta": ("dropout/roberta", TEXT, HIDDEN | dict(classifier_dropout=.31)),
    "distilbert": ("dropout/distilbert", TEXT, dict(dropout=.11, attention_dropout=.23, seq_classif_dropout=.31)),
    "gpt2": ("generation/gpt2", tf.AutoModelForCausalLM, dict(embd_pdrop=.07, resid_pdrop=.11, attn_pdrop=.23)),
    "llama": ("models/llama_clm_all", tf.AutoModelForCausalLM, dict(attention_dropout=.23)),
    "qwen2": ("generation/qwen2", tf.AutoModelForCausalLM, dict(attention_dropout=.23)),
    "vit": ("models/vit_cls_qv", tf.AutoModelForImageClassification, HIDDEN),
}
NEW = {
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES, type_vocab_size=1)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=97, dim=12, n_layers=1, n_heads=2, hidden_dim=20, max_position_embeddings=32, num_labels=3)),
}


def scaled(x, p=.5, training=True, inplace=False): return x * (1 + p) if training else x


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    out, g, io = sys.argv[1], torch.Generator().manual_seed(7), {}
    for name, build in NEW.items():
        torch.manual_seed(0); m = build(); randomise(m, g); shutil.rmtree(os.path.join(out, name), ignore_errors=True); m.save_pretrained(os.path.join(out, name, "base"))
    models = {}
    for name, (folder, kind, shares) in CASES.items():
        path = os.path.join(DATA, folder, "base") if not folder.startswith("dropout") else os.path.join(out, name, "base")
        config = tf.AutoConfig.from_pretrained(path, **shares, attn_implementation="eager")
        for key, value in shares.items(): setattr(config, key, value)
        models[name] = kind.from_pretrained(path, config=config, attn_implementation="eager").double().train()
    torch.nn.functional.dropout = scaled; double_everywhere()
    for name, m in models.items():
        folder, _, shares = CASES[name]
        source = folder if folder.startswith("models") else "models/" + ("llama_clm_all" if "generation" in folder else "bert_cls_qv")
        held = np.load(os.path.join(DATA, source, "io.npz"))
        kw = {k: torch.tensor(held[k].astype("f8") if k == "pixel_values" else held[k]) for k in ("input_ids", "attention_mask", "pixel_values") if k in held}
        if name == "roberta": kw["input_ids"] = torch.where(kw["attention_mask"] == 1, kw["input_ids"], 1)
        with torch.no_grad(): io[f"{name}.logits"] = m(**kw).logits.numpy()
        io[f"{name}.config"] = json.dumps(shares); assert io[f"{name}.logits"].dtype == np.float64
        print(name, io[f"{name}.logits"].shape)
    np.savez_compressed(os.path.join(out, "io.npz"), **io)
