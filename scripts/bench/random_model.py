"""Writes a GGUF file of random weights with the shape of a real model, in seconds, to measure training speed on.

    python random_model.py qwen2.5-1.5b|llama-8b q4_0|q4_k FILE.gguf [--layers N]

The linear layers are 4-bit, the embedding is Q8_0; weights are near 0.02 in size, so that activations stay finite. The tokenizer
knows single bytes alone: a row has about as many tokens as its text has bytes. What such a model says is noise; how long a step
takes, and what memory, is that of the real model.
"""

import argparse

import gguf
import numpy as np

SHAPES = {
    "qwen2.5-1.5b": dict(
        architecture="qwen2", embedding=1536, feed_forward=8960, layers=28, heads=12, kv_heads=2, vocabulary=151936,
        tied=True, bias=True, rope=1e6, context=32768, epsilon=1e-6, pre="qwen2",
    ),
    "llama-8b": dict(
        architecture="llama", embedding=4096, feed_forward=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256,
        tied=False, bias=False, rope=5e5, context=8192, epsilon=1e-5, pre="llama-bpe",
    ),
}  # fmt: skip
SIZE = 0.02  # standard deviation of the weights
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Q = gguf.GGMLQuantizationType


def blocks(kind, random, count):
    """So many random blocks of a quantised type, as bytes [count, bytes of a block]."""
    data = random.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)

    def scale(at, value):
        data[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    if kind == Q.Q4_0:  # (q - 8) scale, q of 16 values
        scale(0, SIZE / 4.6)
    elif kind == Q.Q8_0:
        scale(0, SIZE / 74)
    elif kind == Q.Q4_K:  # scale s q - minimum m, s and m of 64 values and q of 16
        scale(0, SIZE / 250)
        scale(2, 7.5 * SIZE / 250)
    return data


def vocabulary(size):
    """Tokens, types and merges: the bytes as GPT-2 writes them, one merge, fillers, and the three special tokens of ChatML."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [letters[b] for b in range(256)] + ["Ġt"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [f"<filler {i}>" for i in range(size - len(tokens) - len(special))] + special
    types = [gguf.TokenType.NORMAL] * (size - 3) + [gguf.TokenType.CONTROL] * 3
    return tokens, types, ["Ġ t"]


def write(path, shape, kind, layers=None, seed=1):
    s = SHAPES[shape] | ({"layers": layers} if layers else {})
    random = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, s["architecture"])
    w.add_name(f"Random weights of the shape of {shape}")
    w.add_block_count(s["layers"])
    w.add_context_length(s["context"])
    w.add_embedding_length(s["embedding"])
    w.add_feed_forward_length(s["feed_forward"])
    w.add_head_count(s["heads"])
    w.add_head_count_kv(s["kv_heads"])
    w.add_rope_freq_base(s["rope"])
    w.add_layer_norm_rms_eps(s["epsilon"])
    if s["architecture"] == "llama":
        w.add_rope_dimension_count(s["embedding"] // s["heads"])
        w.add_vocab_size(s["vocabulary"])
    tokens, types, merges = vocabulary(s["vocabulary"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(s["pre"])
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_eos_token_id(s["vocabulary"] - 1)
    w.add_pad_token_id(s["vocabulary"] - 3)
    w.add_add_bos_token(False)
    w.add_chat_template(CHATML)

    d, f = s["embedding"], s["feed_forward"]
    kv = d // s["heads"] * s["kv_heads"]
    tensors = [("token_embd.weight", Q.Q8_0, (s["vocabulary"], d)), ("output_norm.weight", Q.F32, (d,))]
    if not s["tied"]:
        tensors.append(("output.weight", Q.Q8_0, (s["vocabulary"], d)))
    for i in range(s["layers"]):
        for name, out, width in (
            ("attn_q", d, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, d),
            ("ffn_gate", f, d), ("ffn_up", f, d), ("ffn_down", d, f),
        ):  # fmt: skip
            tensors.append((f"blk.{i}.{name}.weight", kind, (out, width)))
            if s["bias"] and name in ("attn_q", "attn_k", "attn_v"):
                tensors.append((f"blk.{i}.{name}.bias", Q.F32, (out,)))
        tensors += [(f"blk.{i}.{name}.weight", Q.F32, (d,)) for name in ("attn_norm", "ffn_norm")]
    # Tensors take their blocks from a pool, each from another place: random numbers by the gigabyte would take minutes.
    pools = {k: blocks(k, random, 1 << 18) for k in {kind, Q.Q8_0}}

    def content(name, kind, shape):
        if kind == Q.F32:
            return np.full(shape, 1 if "norm" in name else 0, np.float32)
        pool = pools[kind]
        count = shape[0] * shape[1] // gguf.GGML_QUANT_SIZES[kind][0]
        return np.resize(np.roll(pool, -int(random.integers(len(pool))), axis=0), (count, pool.shape[1])).reshape(shape[0], -1)

    for name, kind_of, dims in tensors:
        per_block, size = gguf.GGML_QUANT_SIZES[kind_of]
        w.add_tensor_info(name, dims, np.dtype(np.float32), int(np.prod(dims)) // per_block * size, raw_dtype=kind_of)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for name, kind_of, dims in tensors:
        w.write_tensor_data(content(name, kind_of, dims))
    w.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=["q4_0", "q4_k"])
    parser.add_argument("file")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model has")
    args = parser.parse_args()
    write(args.file, args.shape, Q[args.type.upper()], args.layers)


if __name__ == "__main__":
    main()
