"""Writes testdata/peft: an adapter as PEFT saves it, and the same weights with B's rows in the order of a llama GGUF.

    python internal/lora/testdata/make_peft.py     (torch, transformers, peft 0.21)
"""

import json
import pathlib

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 4, 2
out = pathlib.Path(__file__).parent / "peft"


def permute(weights, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


torch.manual_seed(1)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
)
modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.05, target_modules=modules, task_type="CAUSAL_LM")
model = get_peft_model(model, config)
for name, p in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p)
model.save_pretrained(out)
(out / "README.md").unlink()

config = json.loads((out / "adapter_config.json").read_text())
config["base_model_name_or_path"] = "tiny"
config["target_modules"] = modules  # PEFT keeps a set, in any order
(out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

weights = load_file(out / "adapter_model.safetensors")
for name, w in weights.items():
    if "q_proj.lora_B" in name:
        weights[name] = torch.from_numpy(np.ascontiguousarray(permute(w.numpy(), HEADS)))
    if "k_proj.lora_B" in name:
        weights[name] = torch.from_numpy(np.ascontiguousarray(permute(w.numpy(), KV_HEADS)))
save_file(weights, out / "gguf_order.safetensors")
