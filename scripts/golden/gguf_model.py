"""A GGUF model as a float32 transformers model, for the scripts that ask PyTorch what hone should compute.

The weights are the dequantised ones (gguf.quants.dequantize), so the model is exactly the function that the
quantised file defines, computed in float32. transformers can read GGUF files too; train_golden.py checks that
both readings of the default model agree, so neither is trusted alone.
"""

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

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
# Vectors of a layer; which of them a model has depends on its architecture.
VECTORS = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
]
# By general.architecture. llama.cpp's converter permutes the rows of q and k of Llama models alone: those of the
# others stay as they are, and the engine rotates halves instead of pairs.
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PERMUTED = ("llama",)


def permute(w, heads):
    """Rows of q or k from Hugging Face's order (halves) to llama.cpp's (interleaved pairs), as its converter does."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    """The inverse of permute."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def load(path):
    """Returns the model of the GGUF file at path: transformers, float32, eval mode, no gradients."""
    reader = gguf.GGUFReader(path)

    def general(name, default=None):
        f = reader.get_field(name)
        if f is None:
            if default is None:
                raise SystemExit(f"{path}: no metadata key {name}")
            return default
        return f.contents()

    architecture = general("general.architecture")
    if architecture not in CLASSES:
        raise SystemExit(f"{path}: architecture is {architecture!r}, expected one of {', '.join(CLASSES)}")

    def field(name, default=None):
        return general(f"{architecture}.{name}", default)

    tensors = {t.name: t for t in reader.tensors}

    def weight(name):
        t = tensors[name]
        return dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))).astype(np.float32)

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    embedding = weight("token_embd.weight")
    tied = "output.weight" not in tensors
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)}
    if field("rope.scaling.type", "none") != "none":
        rope |= {"rope_type": field("rope.scaling.type"), "factor": field("rope.scaling.factor")}
    Config, Model = CLASSES[architecture]
    config = Config(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("attention.key_length", embedding.shape[1] // heads),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": weight("output_norm.weight")}
    state["lm_head.weight"] = embedding if tied else weight("output.weight")

    def rows(name, w):
        if architecture in PERMUTED and name in ("attn_q", "attn_k"):
            w = unpermute(w, heads if name == "attn_q" else kv_heads)
        return w

    for i in range(config.num_hidden_layers):
        for name, hf in MODULES:
            state[f"model.layers.{i}.{hf}.weight"] = rows(name, weight(f"blk.{i}.{name}.weight"))
        for name, hf in VECTORS:
            if f"blk.{i}.{name}" in tensors:
                state[f"model.layers.{i}.{hf}"] = weight(f"blk.{i}.{name}")
    model = Model(config).float().eval()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    if "rope_freqs.weight" in tensors:  # llama3's scaling: the file has what it divides the frequencies by
        model.model.rotary_emb.inv_freq /= torch.from_numpy(weight("rope_freqs.weight"))
    return model.requires_grad_(False)
