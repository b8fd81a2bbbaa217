"""Second adapters of the bases in ../models, and what PEFT computes with two at once, in float64 (offline, CPU, seconds).

Needs: torch, peft, transformers, numpy.  Usage: python make_adapters.py OUTDIR CASE...   (no case: lists them)
For every case it writes OUTDIR/CASE/adapter, beside that of ../models/CASE, and OUTDIR/CASE/io.npz, logits of its inputs:
    first, second       with one of them active
    both                with both (set_adapter of the tuner takes a list)          sum    0.7 first - 0.4 second, add_weighted_adapter's "cat"
Of a classification there are no sums: each has a head of its own.
"""
import json, os, shutil, sys
HERE = os.path.dirname(os.path.abspath(__file__)); MODELS = os.path.join(HERE, "..", "models"); sys.path.insert(0, MODELS)
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
import numpy as np, torch, transformers as tf
from make_models import double_everywhere
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

CASES = {
    "llama_clm_all": (tf.AutoModelForCausalLM, dict(task_type=TaskType.CAUSAL_LM, r=5, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])),
    "bert_cls_qv": (tf.AutoModelForSequenceClassification, dict(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=6, target_modules=["key", "output.dense"], rank_pattern={"layer.1.output.dense": 3})),
}


def make(name, out):
    kind, settings = CASES[name]; base = os.path.join(MODELS, name, "base"); g = torch.Generator().manual_seed(11); d = os.path.join(out, name)
    shutil.rmtree(d, ignore_errors=True)
    p = get_peft_model(kind.from_pretrained(base), LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for n, q in p.named_parameters():
            if q.requires_grad: q.copy_(.3*torch.randn(q.shape, generator=g)*q.shape[-1]**-.5)
    p.save_pretrained(os.path.join(d, "adapter")); os.remove(os.path.join(d, "adapter", "README.md"))
    c = os.path.join(d, "adapter", "adapter_config.json"); q = json.load(open(c)); q["base_model_name_or_path"] = f"../../../models/{name}/base"; json.dump(q, open(c, "w"), indent=2, sort_keys=True)
    p = PeftModel.from_pretrained(kind.from_pretrained(base), os.path.join(MODELS, name, "adapter"), "first")
    p.load_adapter(os.path.join(d, "adapter"), "second"); p = p.double().eval(); double_everywhere()
    held = np.load(os.path.join(MODELS, name, "io.npz")); kw = {k: torch.tensor(held[k]) for k in ("input_ids", "attention_mask")}; io = {}
    def logits():
        with torch.no_grad(): return p(**kw).logits.numpy()
    for each in ("first", "second"): p.set_adapter(each); io[each] = logits()
    if name.startswith("llama"):
        p.base_model.set_adapter(["first", "second"]); io["both"] = logits()
        p.add_weighted_adapter(["first", "second"], [.7, -.4], "sum", combination_type="cat"); p.set_adapter("sum"); io["sum"] = logits()
    assert np.allclose(io["first"], held["logits"], atol=1e-9) and all(v.dtype == np.float64 for v in io.values())
    np.savez_compressed(os.path.join(d, "io.npz"), **io); print(name, {k: v.shape for k, v in io.items()})


if __name__ == "__main__":
    if len(sys.argv) < 3: print(__doc__, *CASES)
    elif len(sys.argv) == 3: make(sys.argv[2], sys.argv[1])
    else:
        import subprocess
        for n in sys.argv[2:]: subprocess.run([sys.executable, __file__, sys.argv[1], n], check=True)
