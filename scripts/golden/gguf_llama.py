"""A Llama GGUF as a float32 transformers model, for the scripts that ask PyTorch what hone should compute.

The weights are the dequantised ones (gguf.quants.dequantize), so the model is exactly the function that the
quantised file defines, computed in float32. transformers can read GGUF files too; llama_golden.py checks that
both readings of the default model agree, so neither is trusted alone.
"""

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

# The projections of one layer, in the order that numbers LoRA tensors (see tensor_index in lora.py),
# as (GGUF name, transformers name).
MODULES = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
]


def permute(w, heads):
    """Rows of q or k from Hugging Face's order (halves) to llama.cpp's (interleaved pairs), as its converter does."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    """The inverse of permute."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def load(path):
    """Returns the model of the GGUF file at path: transformers, float32, eval mode, no gradients."""
    reader = gguf.GGUFReader(path)

    def field(name, default=None):
        f = reader.get_field(name)
        if f is None:
            if default is None:
                raise SystemExit(f"{path}: no metadata key {name}")
            return default
        return f.contents()

    if field("general.architecture") != "llama":
        raise SystemExit(f"{path}: architecture is {field('general.architecture')!r}, expected 'llama'")
    tensors = {t.name: t for t in reader.tensors}

    def weight(name):
        t = tensors[name]
        return dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))).astype(np.float32)

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    embedding = weight("token_embd.weight")
    tied = "output.weight" not in tensors
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": weight("output_norm.weight")}
    state["lm_head.weight"] = embedding if tied else weight("output.weight")
    for i in range(config.num_hidden_layers):
        for name, hf in MODULES:
            w = weight(f"blk.{i}.{name}.weight")
            if name in ("attn_q", "attn_k"):
                w = unpermute(w, heads if name == "attn_q" else kv_heads)
            state[f"model.layers.{i}.{hf}.weight"] = w
        state[f"model.layers.{i}.input_layernorm.weight"] = weight(f"blk.{i}.attn_norm.weight")
        state[f"model.layers.{i}.post_attention_layernorm.weight"] = weight(f"blk.{i}.ffn_norm.weight")
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return model.requires_grad_(False)
