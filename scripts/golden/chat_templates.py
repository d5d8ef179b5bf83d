#!/usr/bin/env python3
"""Renders the chat templates of internal/prompt/testdata as transformers does, into rendered.json beside them.

    python3 scripts/golden/chat_templates.py        (needs jinja2 3.1)

internal/prompt's test compares its own rendering with the file, byte for byte.
"""
import json
import pathlib

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

TESTDATA = pathlib.Path(__file__).resolve().parents[2] / "internal" / "prompt" / "testdata"

# bos_token and eos_token of each model.
TOKENS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": ("", "<|im_end|>"),
    "qwen3": ("", "<|im_end|>"),
    "deepseek-r1-distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "mistral": ("<s>", "</s>"),
}

CONVERSATIONS = {
    "user": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [{"role": "system", "content": "Answer with one letter."}, {"role": "user", "content": "1+1?\nA. 2\nB. 3"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "  Bye \n"},
    ],
    "finished": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello! "}],
    "chinese": [{"role": "system", "content": "请回答。"}, {"role": "user", "content": "中国的首都是哪里？\u3000"}, {"role": "assistant", "content": "北京。"}],
    "reasoning": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"}],
    "reasoning before": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {
            "name": "weather", "arguments": {"city": "北京", "days": 2, "units": {"t": "<C>", "a": 1.0}}}}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ],
}

CONVERSATIONS["tools defined"] = CONVERSATIONS["system"]
CONVERSATIONS["tools called"] = CONVERSATIONS["tools"] + [{"role": "assistant", "content": "Sunny."}]

# Tools of the conversations that have some, as OpenAI's API has them.
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a city, 天气", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "default": 1.5}}, "required": ["city"]}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
TOOLS = {"tools defined": [WEATHER, CLOCK], "tools called": [WEATHER]}


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception

cases = []
for name, (bos, eos) in TOKENS.items():
    template = env.from_string((TESTDATA / f"{name}.jinja").read_text(encoding="utf-8"))
    for conversation, messages in CONVERSATIONS.items():
        for generation in (False, True):
            case = {"template": name, "conversation": conversation, "generation_prompt": generation}
            try:
                case["text"] = template.render(
                    messages=messages, tools=TOOLS.get(conversation), documents=None, add_generation_prompt=generation, bos_token=bos, eos_token=eos)
            except jinja2.exceptions.TemplateError as e:
                case["error"] = str(e)
            except TypeError as e:  # None + str in a template that knows no tool calls
                case["error"] = str(e)
            cases.append(case)

messages = {}
for name, conversation in CONVERSATIONS.items():
    conversation = json.loads(json.dumps(conversation))
    for message in conversation:  # as OpenAI's API has them
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    messages[name] = conversation
out = {"tokens": TOKENS, "conversations": messages, "tools": TOOLS, "cases": cases}
(TESTDATA / "rendered.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
print(f"{len(cases)} renderings")
