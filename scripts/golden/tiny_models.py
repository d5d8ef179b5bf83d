"""Tiny random base models, one GGUF file for each architecture, whose tensors are spread over the types that files have.

Names of tensors and keys are those that llama.cpp loads (its llama-arch.cpp) and its converter writes. Types that
gguf-py quantises are quantised; of K-quants and IQ4_NL, which it only reads, blocks of random bits are written with
scales that give the weights the wanted size. The function that a file defines is that of its dequantised weights in any
case, so nothing is lost, and random bits reach every field of a block.
"""

import dataclasses
import math

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import gguf_model

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["t h", "th e", "i n", "a n", "e r", "o n", "r e", "a t", "e n", "o r", "e s", "i s", "an d"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# llama3's rope scaling with lengths that matter in rows of 40 tokens.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}


@dataclasses.dataclass
class Model:
    """One tiny model. types are those of token_embd, output and the seven projections of every layer in turn."""

    name: str
    architecture: str
    types: list
    embedding: Type = Type.Q8_0
    head: Type | None = None  # None: tied
    layers: int = 2
    hidden: int = 64
    ff: int = 160
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # LLAMA3 or linear, as transformers names it
    epsilon: float = 1e-5
    tokenizer: str = "smollm"
    seed: int = 7

    @property
    def vocabulary(self):
        return len(self.tokens())

    def tokens(self):
        """3 special tokens, the 256 bytes and a few merges."""
        return SPECIAL + byte_pieces() + [m.replace(" ", "") for m in MERGES]

    def type_of(self, layer, module):
        return self.types[(layer * len(gguf_model.MODULES) + module) % len(self.types)]


def uniform(quant):
    return [quant] * len(gguf_model.MODULES)


# q, k, v, o, gate, up, down of llama.cpp's mixtures Q4_K_M and Q5_K_M.
Q4_K_M = [Type.Q4_K, Type.Q4_K, Type.Q6_K, Type.Q4_K, Type.Q4_K, Type.Q4_K, Type.Q6_K]
Q5_K_M = [Type.Q5_K, Type.Q5_K, Type.Q6_K, Type.Q5_K, Type.Q5_K, Type.Q5_K, Type.Q6_K]

MODELS = [
    Model("tiny-llama-q4_1", "llama", uniform(Type.Q4_1)),
    Model("tiny-llama-q8_0", "llama", uniform(Type.Q8_0), head=Type.Q8_0, layers=1),
    # Llama 3: scaled rotary frequencies, an untied head, one layer of each K mixture.
    Model(
        "tiny-llama3", "llama", Q4_K_M + Q5_K_M, embedding=Type.Q4_K, head=Type.Q6_K, hidden=256, ff=256, kv_heads=1, head_dim=64,
        rope_base=500000.0, rope_scaling=LLAMA3, tokenizer="llama-bpe",
    ),
    # Mistral: heads that are wider than the embedding, linearly scaled positions.
    Model(
        "tiny-mistral", "llama", [Type.Q4_0, Type.Q5_0, Type.Q5_1], embedding=Type.Q4_0, head=Type.Q5_1, heads=4, kv_heads=1, head_dim=32,
        rope_base=1e6, rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    # Qwen 2: biases of q, k and v, a tied head.
    Model(
        "tiny-qwen2", "qwen2", [Type.Q5_0, Type.IQ4_NL, Type.Q5_1, Type.Q8_0], embedding=Type.IQ4_NL, rope_base=1e6, epsilon=1e-6,
        tokenizer="qwen2",
    ),
    # Qwen 3: norms of each head's q and k, heads that are wider than the embedding.
    Model(
        "tiny-qwen3", "qwen3", [Type.F16, Type.BF16, Type.F32, Type.Q4_0], embedding=Type.BF16, layers=3, heads=4, kv_heads=2, head_dim=32,
        rope_base=1e6, epsilon=1e-6, tokenizer="qwen2",
    ),
    # Qwen 3 as it is served: Q4_K_M, tied, with the head's type that llama.cpp gives a tied one.
    Model(
        "tiny-qwen3-q4_k_m", "qwen3", Q4_K_M, embedding=Type.Q6_K, layers=1, hidden=256, ff=512, heads=4, kv_heads=2, head_dim=128,
        rope_base=1e6, epsilon=1e-6, tokenizer="qwen2",
    ),
]


def byte_pieces():
    """GPT-2's printable stand-ins of the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pieces, spare = [], 256
    for b in range(256):
        if b in printable:
            pieces.append(chr(b))
        else:
            pieces.append(chr(spare))
            spare += 1
    return pieces


# Where the float16 scales of a block are; all of its other bytes may have any value.
RANDOM_BLOCKS = {Type.Q4_K: ("d", 0, "dmin", 2), Type.Q5_K: ("d", 0, "dmin", 2), Type.Q6_K: ("d", 208), Type.IQ4_NL: ("d", 0)}
# The mean of the quants that a minimum is taken from.
MIDDLE = {Type.Q4_K: 7.5, Type.Q5_K: 15.5}


def random_blocks(rng, rows, columns, scale, quant):
    """A matrix of random blocks whose weights have about the standard deviation scale."""
    weights, size = gguf.GGML_QUANT_SIZES[quant]
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)

    def set_scales(d):
        places = dict(zip(RANDOM_BLOCKS[quant][::2], RANDOM_BLOCKS[quant][1::2]))
        for name, place in places.items():
            value = d * MIDDLE[quant] if name == "dmin" else d
            blocks[:, place : place + 2] = value.astype("<f2")[:, None].view(np.uint8)

    unit = np.float64(2.0**-10)
    set_scales(np.full(len(blocks), unit))
    d = scale / dequantize(blocks, quant).std() * unit * rng.uniform(0.7, 1.3, len(blocks))
    set_scales(d)
    return blocks.reshape(rows, -1)


def encode(rng, rows, columns, scale, quant, permuted_heads):
    if quant in RANDOM_BLOCKS:
        return random_blocks(rng, rows, columns, scale, quant)
    m = rng.normal(0, scale, (rows, columns)).astype(np.float32)
    if permuted_heads:
        m = gguf_model.permute(m, permuted_heads)
    if quant == Type.F32:
        return m
    if quant == Type.F16:
        return m.astype(np.float16)
    return quantize(m, quant)


def rope_factors(model):
    """What llama.cpp's converter puts into rope_freqs.weight: the plain frequencies over those of the scaling."""

    def frequencies(rope):
        config = LlamaConfig(
            hidden_size=model.hidden, num_attention_heads=model.heads, head_dim=model.head_dim, max_position_embeddings=512,
            rope_parameters={"rope_theta": model.rope_base, **rope},
        )
        return LlamaRotaryEmbedding(config).inv_freq

    return (frequencies({"rope_type": "default"}) / frequencies(model.rope_scaling)).numpy()


def write(model, path):
    """Writes the GGUF file of a Model."""
    rng = np.random.default_rng(model.seed)
    tokens = model.tokens()
    w = gguf.GGUFWriter(path, model.architecture)
    w.add_name("tiny random llama" if model.architecture == "llama" else f"tiny random {model.architecture}")
    w.add_context_length(512)
    w.add_embedding_length(model.hidden)
    w.add_block_count(model.layers)
    w.add_feed_forward_length(model.ff)
    w.add_head_count(model.heads)
    w.add_head_count_kv(model.kv_heads)
    w.add_layer_norm_rms_eps(model.epsilon)
    w.add_rope_freq_base(model.rope_base)
    if model.architecture == "llama":  # the converter writes it for Llama only
        w.add_rope_dimension_count(model.head_dim)
    if model.head_dim * model.heads != model.hidden:
        w.add_key_length(model.head_dim)
        w.add_value_length(model.head_dim)
    if model.rope_scaling and model.rope_scaling["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(model.rope_scaling["factor"])
    w.add_vocab_size(len(tokens))
    w.add_file_type({Type.Q4_1: 3, Type.Q8_0: 7}.get(model.types[0], 0))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(model.tokenizer)
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHATML)

    def matrix(name, rows, columns, scale, quant, permuted_heads=0):
        w.add_tensor(name, encode(rng, rows, columns, scale * math.sqrt(64 / model.hidden), quant, permuted_heads), raw_dtype=quant)

    def norm(name, size):
        w.add_tensor(name, (1 + 0.2 * rng.normal(0, 1, size)).astype(np.float32))

    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes = [
        (q, model.hidden, 0.2), (kv, model.hidden, 0.2), (kv, model.hidden, 0.12), (model.hidden, q, 0.12),
        (model.ff, model.hidden, 0.12), (model.ff, model.hidden, 0.12), (model.hidden, model.ff, 0.12),
    ]
    matrix("token_embd.weight", len(tokens), model.hidden, 0.2, model.embedding)
    if model.rope_scaling is LLAMA3:
        w.add_tensor("rope_freqs.weight", rope_factors(model))
    for i in range(model.layers):
        norm(f"blk.{i}.attn_norm.weight", model.hidden)
        for m, ((name, _), (rows, columns, scale)) in enumerate(zip(gguf_model.MODULES, shapes)):
            if name == "ffn_gate":
                norm(f"blk.{i}.ffn_norm.weight", model.hidden)
            permuted = {"attn_q": model.heads, "attn_k": model.kv_heads}.get(name, 0) if model.architecture == "llama" else 0
            matrix(f"blk.{i}.{name}.weight", rows, columns, scale, model.type_of(i, m), permuted)
        if model.architecture == "qwen2":
            for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                w.add_tensor(f"blk.{i}.{name}.bias", (0.3 * rng.normal(0, 1, rows)).astype(np.float32))
        if model.architecture == "qwen3":
            norm(f"blk.{i}.attn_q_norm.weight", model.head_dim)
            norm(f"blk.{i}.attn_k_norm.weight", model.head_dim)
    norm("output_norm.weight", model.hidden)
    if model.head:
        matrix("output.weight", len(tokens), model.hidden, 0.2, model.head)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
