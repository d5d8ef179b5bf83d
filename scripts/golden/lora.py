"""LoRA tensors that Python and Go can both make without storing them: values of a counter-based generator.

    state = seed * 2^48 + tensor * 2^32 + element            (64 bits, wrapping)
    z = splitmix64(state)
    z = state + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    u = (z >> 11) / 2^53                                     in [0, 1), float64
    value = float32((2 u - 1) * bound)

tensor is ((layer * 7) + module) * 2 + (0 for A, 1 for B), with the modules numbered q, k, v, o, gate, up, down.
element is row * columns + column, with A of shape [r, in] and B of shape [out, r], both in PEFT's (Hugging Face's)
order: a program that keeps llama.cpp's order of q and k rows makes B as defined here and then permutes its rows.
bound is 1/sqrt(in) for A, which is PEFT's own initialisation (kaiming_uniform with a = sqrt 5), and `b_bound` of the
golden file for B.

To check a port: splitmix64 of seed 1, tensor 0, elements 0 and 1 is 11711021152883586896 and 62654667206561001, which
with bound 1 are the values 0.26971146 and -0.993207.
"""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from gguf_model import MODULES

TARGETS = [hf.split(".")[1] for _, hf in MODULES]

SEED_VALUES = 1  # of A and B
SEED_SKETCH = 2  # of the signs that gradients are projected on


def splitmix64(seed, tensor, count):
    """The numbers z of elements 0..count-1 of one tensor, uint64."""
    with np.errstate(over="ignore"):
        state = np.uint64((seed << 48) + (tensor << 32)) + np.arange(count, dtype=np.uint64)
        z = state + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(tensor, shape, bound):
    z = splitmix64(SEED_VALUES, tensor, int(np.prod(shape)))
    u = (z >> np.uint64(11)).astype(np.float64) / 2.0**53
    return ((2 * u - 1) * bound).astype(np.float32).reshape(shape)


def sketch(tensor, values):
    """64 projections of a tensor on random signs: projection k is the sum of values, each with the sign of bit k of
    its z (seed 2): + where the bit is 1. The mean of the squared projections of a difference estimates its squared
    norm (to about 9% of the norm), so the error of a whole tensor can be measured without storing the tensor."""
    z = splitmix64(SEED_SKETCH, tensor, values.size)
    flat = values.reshape(-1).astype(np.float64)
    out = np.empty(64, dtype=np.float32)
    for k in range(64):
        bit = ((z >> np.uint64(k)) & np.uint64(1)).astype(bool)
        out[k] = flat[bit].sum() - flat[~bit].sum()
    return out


def config(r, alpha, targets=None, layers=None, rslora=False):
    """LoRA on the named projections (q_proj, ...; None: all seven) of the given layers (None: every one)."""
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets or TARGETS, layers_to_transform=layers, use_rslora=rslora
    )


def tensors_of(model):
    """The LoRA tensors of a PEFT model in the order of their tensor numbers, as (tensor number, name, parameter); name
    is like layers.0.self_attn.q_proj.lora_A."""
    parameters = dict(model.named_parameters())
    tensors = []
    for layer in range(model.config.num_hidden_layers):
        for m, (_, hf) in enumerate(MODULES):
            for which, letter in enumerate("AB"):
                name = f"layers.{layer}.{hf}.lora_{letter}"
                p = parameters.pop(f"base_model.model.model.{name}.default.weight", None)
                if p is not None:
                    tensors.append(((layer * 7 + m) * 2 + which, name, p))
    if left := [name for name in parameters if "lora_" in name]:
        raise SystemExit(f"PEFT made LoRA tensors that are not expected: {left}")
    return tensors


def add(model, *args):
    """Puts LoRA on a model, see config. Returns the PEFT model and its tensors."""
    model = get_peft_model(model, config(*args))
    return model, tensors_of(model)


def initialise(tensors, b_bound):
    """Sets A as PEFT does (by this file's generator) and B uniform in [-b_bound, b_bound); 0 is PEFT's own B."""
    with torch.no_grad():
        for number, name, p in tensors:
            bound = b_bound if name.endswith("lora_B") else 1 / np.sqrt(p.shape[1])
            p.copy_(torch.from_numpy(uniform(number, tuple(p.shape), bound)))
