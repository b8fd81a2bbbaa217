"""Other methods of PEFT on the models of `make_models.py` and `make_more_models.py`, in the same files.

Needs: torch, peft, transformers, safetensors, numpy.  Usage: python make_method_models.py OUTDIR [CASE...]
Magnitudes begin at the norms that PEFT gives them, then moved by up to a fifth; factors and blocks are random.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_models
import make_more_models
import numpy as np
import torch
from peft import LoraConfig, MissConfig, TaskType, get_peft_model, get_peft_model_state_dict

DORA = {"r": 3, "lora_alpha": 6, "use_dora": True}
CLS, CLM = TaskType.SEQ_CLS, TaskType.CAUSAL_LM
CASES = {
    "bert_dora": (
        make_models.bert,
        LoraConfig(**DORA, task_type=CLS, target_modules=["word_embeddings", "query", "value", "intermediate.dense"]),
        "cls",
    ),
    "gpt2_dora": (
        make_more_models.gpt2,
        LoraConfig(**DORA, use_rslora=True, task_type=CLM, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "clm",
    ),
    "resnet_dora": (
        make_more_models.bottleneck,
        LoraConfig(**DORA, target_modules=["convolution"], modules_to_save=["classifier.1"]),
        "img20",
    ),
    "bert_miss": (
        make_models.bert,
        MissConfig(r=5, task_type=CLS, target_modules=["query", "value", "intermediate.dense", "output.dense"]),
        "cls",
    ),
}


def short(name):
    """A parameter as PEFT's file calls it."""
    for wrapper in (".default.weight", ".default"):
        if "magnitude" in name or "miss_block" in name:
            name = name.removesuffix(wrapper)
    return name.replace(".default.", ".").replace("modules_to_save.", "").replace(".default", "")


def randomise(model, generator):
    """What is trained: factors and blocks by a normal law, magnitudes near where they are."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.mul_(1 + 0.2 * noise.clamp(-1, 1))
        elif "lora_" in name or "miss_block" in name:
            parameter.copy_(0.3 * noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.05 * noise)


def make(name, out):
    """One case, in a process of its own."""
    build, config, kind = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    generator, rng = torch.Generator().manual_seed(7), np.random.default_rng(3)
    folder = Path(out) / name
    shutil.rmtree(folder, ignore_errors=True)
    model = build()
    make_models.randomise(model, generator)
    model.eval().save_pretrained(folder / "base")
    inputs, labels = make_models.batch(kind, rng)
    io = {key: value.numpy().astype("f4" if value.is_floating_point() else "i8") for key, value in inputs.items()}
    inputs = {key: torch.tensor(a.astype("f8") if a.dtype.kind == "f" else a) for key, a in io.items()}
    io["labels"] = labels.numpy()
    plain = type(model).from_pretrained(folder / "base").eval()
    adapted = get_peft_model(type(model).from_pretrained(folder / "base").eval(), config)
    with torch.no_grad():
        randomise(adapted, generator)
    adapted.save_pretrained(folder / "adapter")
    saved = get_peft_model_state_dict(adapted)
    adapted = adapted.double().eval()
    make_models.double_everywhere()
    with torch.no_grad():
        io["logits0"] = plain.double()(**inputs).logits.numpy()
    trained = {short(key): value for key, value in adapted.named_parameters() if value.requires_grad}
    assert set(trained) == set(saved), set(trained) ^ set(saved)

    def loss():
        if kind == "clm":
            result = adapted(**inputs, labels=labels)
            return result.loss, result.logits
        logits = adapted(**inputs).logits
        return torch.nn.functional.cross_entropy(logits, labels), logits

    value, logits = loss()
    value.backward()
    io |= {"logits": logits.detach().numpy(), "loss": np.float64(value.item())}
    io |= {f"grad/{key}": parameter.grad.numpy().copy() for key, parameter in trained.items()}
    optimizer, losses = torch.optim.AdamW(list(trained.values()), lr=1e-2, weight_decay=0.01), []
    for _ in range(3):
        optimizer.zero_grad()
        value, _ = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    io["losses"] = np.array(losses)
    io |= {f"after/{key}": parameter.detach().numpy().copy() for key, parameter in trained.items()}
    np.savez_compressed(folder / "io.npz", **io)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    path = folder / "adapter" / "adapter_config.json"
    raw = json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}
    path.write_text(json.dumps(raw, indent=2, sort_keys=True))
    moved = abs(io["logits"] - io["logits0"]).max()
    print(f"{name}: loss {io['loss']:.6f} -> {losses}, {len(trained)} trained tensors, logits moved by {moved:.3f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        make(sys.argv[2], sys.argv[1])
    else:
        for case in sys.argv[2:] or CASES:
            subprocess.run([sys.executable, __file__, sys.argv[1], case], check=True)
