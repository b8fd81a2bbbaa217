"""Write the folders `tests/data/peft/made_*` with Hugging Face PEFT: kinds of adapters beyond the given fixtures.

    python tests/data/make_peft_fixtures.py [KIND ...]      # needs torch, transformers and peft

A developer's tool: the tests read what it wrote and import none of the three. Each folder holds the adapter as PEFT
saved it, the base's parameters, and `io.npz` with the parameters that merging changes, merged in float64.
"""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

FOLDER = Path(__file__).parent / "peft"


class Words(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.mid = nn.Linear(8, 8, bias=bias)
        self.head = nn.Linear(8, 13, bias=bias)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.mid(self.embed(x)))))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(9, 9), "v": nn.Linear(9, 7)}) for _ in range(3)])
        self.v = nn.Linear(7, 5)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer["q"](x))
        return self.v(self.layers[-1]["v"](x))


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(5, 6, 3)
        self.two = nn.Conv2d(1, 4, (2, 3), bias=True)
        self.end = nn.Linear(4, 3)

    def forward(self, x):
        return self.end(self.two(self.one(x).unsqueeze(1)).mean((2, 3)))


class Gpt2ish(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = Conv1D(9, 6)
        self.c_proj = Conv1D(9, 9)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


def llama(tied=False):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=12, n_layer=2, n_head=2))


TOKENS = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
CONV1D = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
KINDS = {
    "embedding": (Words, {"r": 3, "target_modules": ["embed", "mid"]}, TOKENS),
    "embedding_dora": (Words, {"r": 3, "target_modules": ["embed", "mid"], "use_dora": True}, TOKENS),
    "lora_bias": (Words, {"r": 3, "target_modules": ["mid", "head"], "lora_bias": True}, TOKENS),
    "bias_all": (Words, {"r": 3, "target_modules": ["mid"], "bias": "all"}, TOKENS),
    "bias_all_lora_bias": (Words, {"r": 3, "target_modules": ["mid"], "bias": "all", "lora_bias": True}, TOKENS),
    "bias_lora_only": (Words, {"r": 3, "target_modules": ["mid"], "bias": "lora_only"}, TOKENS),
    "patterns": (
        Deep,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q", "v"],
            # PEFT sorts the keys when it saves, and the first match wins when it loads.
            "rank_pattern": {"^v": 1, r"layers\.1\.q": 2, r"layers\.2\.v": 5, "v": 3},
            "alpha_pattern": {"0.q": 1, "^v$": 11, "layers.[12].q": 13, "q": 9, "s.1.v": 7},
        },
        ROWS,
    ),
    "patterns_rslora": (
        Deep,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q", "v"], "use_rslora": True,
            "rank_pattern": {"v": 3}, "alpha_pattern": {"q": 9},
        },
        ROWS,
    ),
    "modules_to_save": (Words, {"r": 3, "target_modules": ["mid"], "modules_to_save": ["head", "norm"]}, TOKENS),
    "convs_lora_bias": (Convs, {"r": 2, "target_modules": ["one", "two"], "lora_bias": True}, torch.randn(2, 5, 9)),
    "conv1d_dora": (Convs, {"r": 2, "target_modules": ["one", "two"], "use_dora": True}, torch.randn(2, 5, 9)),
    "gpt2_dora": (Gpt2ish, {**CONV1D, "use_dora": True}, torch.randn(3, 6)),
    "gpt2_lora_bias": (Gpt2ish, {**CONV1D, "lora_bias": True}, torch.randn(3, 6)),
    "model_llama": (llama, {"r": 4, "target_modules": "all-linear"}, TOKENS),
    "model_llama_tied": (
        lambda: llama(True), {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}, TOKENS,
    ),
    "model_gpt2": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}, TOKENS),
    "model_gpt2_mixed": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "wte", "lm_head"]}, TOKENS),
    "high_rank": (Words, {"r": 11, "target_modules": ["mid"]}, TOKENS),
}  # fmt: skip


def randomise(model):
    """Give every trained tensor values that a training run could have left: zeros hide errors."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name or (parameter.requires_grad and name.endswith(("bias", "weight"))):
            parameter.data += 0.3 * torch.randn_like(parameter)


def make(kind):
    build, options, x = KINDS[kind]
    torch.manual_seed(sum(map(ord, kind)))
    folder = FOLDER / f"made_{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    base = build()
    whole = hasattr(base, "save_pretrained")
    if whole:
        base.save_pretrained(folder / "base")
    else:
        folder.mkdir(parents=True)
        save_file(base.state_dict(), folder / "base.safetensors")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**{"lora_alpha": 5, **options}))
    randomise(model)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    fresh = type(base).from_pretrained(folder / "base") if whole else build()
    if not whole:
        fresh.load_state_dict(before)
    model = PeftModel.from_pretrained(fresh, folder).double().eval()
    arrays = {}
    with torch.no_grad():
        y = model(x.double() if x.is_floating_point() else x)
        arrays["x"], arrays["y_adapter64"] = x.numpy(), (y.logits if whole else y).numpy()
        merged = model.merge_and_unload()
        y = merged(x.double() if x.is_floating_point() else x)
        arrays["y_merged64"] = (y.logits if whole else y).numpy()
    gap = abs(arrays["y_merged64"] - arrays["y_adapter64"]).max()
    for name, tensor in merged.state_dict().items():
        if not torch.equal(tensor, before[name].double()):
            arrays[f"merged/{name}"] = tensor.numpy()
    np.savez_compressed(folder / "io.npz", **arrays)
    print(f"{kind}: {len(arrays) - 3} tensors change, merged and adapter outputs differ by {gap:.2g}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for kind in sys.argv[1:] or KINDS:
        make(kind)
