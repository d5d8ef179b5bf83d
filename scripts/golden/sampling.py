"""Writes internal/runner/testdata/sampling.json: what Hugging Face's logits processors make of logits.

    python scripts/golden/sampling.py

Each case has logits, the tokens of prompt and completion, and a request's parameters; `probabilities` is what is drawn
from. The processors stand in the order of GenerationMixin._get_logits_processor. OpenAI's presence and frequency
penalties, which transformers does not have, are its documentation's formula, after the repetition penalty as in vLLM.
"""

import json
import pathlib

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SIZE = 48
generator = torch.Generator().manual_seed(5)


def case(name, temperature=1.0, top_p=1.0, allowed=None, **more):
    logits = (torch.randn(1, SIZE, generator=generator) * 3).float()
    prompt = torch.randint(SIZE, (1, 12), generator=generator)
    completion = torch.randint(SIZE, (1, 9), generator=generator)
    completion[0, 3] = completion[0, 5] = completion[0, 0]
    tokens = torch.cat([prompt, completion], dim=1)
    scores = logits.clone()
    if bias := more.get("logit_bias"):
        scores = SequenceBiasLogitsProcessor({(int(t),): float(b) for t, b in bias.items()})(tokens, scores)
    if penalty := more.get("repetition_penalty"):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores)
    counts = torch.bincount(completion[0], minlength=SIZE).float()
    scores = scores - more.get("frequency_penalty", 0) * counts - more.get("presence_penalty", 0) * (counts > 0)
    if allowed:  # a mask comes before all, and is exact here as no processor lowers a token to minus infinity before
        scores = SuppressTokensLogitsProcessor([t for t in range(SIZE) if t not in allowed])(tokens, scores)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(tokens, scores)
    if top_k := more.get("top_k"):
        scores = TopKLogitsWarper(top_k)(tokens, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(tokens, scores)
    if min_p := more.get("min_p"):
        scores = MinPLogitsWarper(min_p)(tokens, scores)
    return {
        "name": name,
        "logits": logits[0].tolist(),
        "prompt": prompt[0].tolist(),
        "completion": completion[0].tolist(),
        "allowed": allowed or [],
        "request": {"temperature": temperature, "top_p": top_p, **more},
        "probabilities": scores[0].double().softmax(-1).tolist(),
    }


cases = [
    case("plain"),
    case("hot", temperature=1.7),
    case("cold", temperature=0.3),
    case("top_k", top_k=7),
    case("top_k of one", top_k=1),
    case("top_k of more than all", top_k=1000),
    case("top_p", top_p=0.8),
    case("small top_p", top_p=0.05),
    case("min_p", min_p=0.1),
    case("top_k and top_p", top_k=9, top_p=0.7),
    case("top_k, top_p and min_p", top_k=20, top_p=0.95, min_p=0.2, temperature=1.3),
    case("top_p and min_p", top_p=0.9, min_p=0.08, temperature=0.8),
    case("repetition", repetition_penalty=1.4),
    case("repetition encouraged", repetition_penalty=0.7),
    case("frequency", frequency_penalty=0.9),
    case("presence", presence_penalty=1.5),
    case("negative penalties", frequency_penalty=-0.5, presence_penalty=-1.0),
    case("bias", logit_bias={"3": 4.5, "11": -100, "40": 1}),
    case("bias and all penalties", logit_bias={"1": 2.5, "30": -3}, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.6),
    case("mask", allowed=[2, 5, 31, 32, 33, 47]),
    case("mask and top_k", allowed=list(range(10, 40)), top_k=4, temperature=2.0),
    case("mask, penalties and top_p", allowed=list(range(0, 48, 2)), top_p=0.85, repetition_penalty=1.3, presence_penalty=0.2),
    case(
        "everything", temperature=0.9, top_k=25, top_p=0.97, min_p=0.01, repetition_penalty=1.15,
        frequency_penalty=0.3, presence_penalty=0.3, logit_bias={"7": 3, "8": -2}, allowed=list(range(3, 45)),
    ),
]
path = pathlib.Path(__file__).parents[2] / "internal/runner/testdata/sampling.json"
path.parent.mkdir(exist_ok=True)
path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
