#!/usr/bin/env python3
"""Renders prompts with tools, reasoning and open turns as transformers does, into internal/prompt/testdata/prompts.json.

    python3 scripts/golden/chat_prompts.py        (needs transformers, see requirements.txt)

internal/prompt's test compares ChatPrompt with the file, byte for byte. Templates take the calls of a message in
different ways: the first of CALL_STYLES that a template does not refuse is taken.
"""
import copy
import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

TESTDATA = pathlib.Path(__file__).resolve().parents[2] / "internal" / "prompt" / "testdata"

# bos_token and eos_token of each model.
TOKENS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5-instruct": ("", "<|im_end|>"),
    "qwen3-0.6b": ("", "<|im_end|>"),
    "hermes": ("<s>", "<|im_end|>"),
    "deepseek-r1-distill-llama": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
WRITES_TOOLS = ("llama3.1", "qwen2.5-instruct", "qwen3-0.6b", "hermes")

# Arguments as an object or as JSON text; no content or an empty one.
CALL_STYLES = [(text, empty) for empty in (False, True) for text in (False, True)]


def function(name, **properties):
    return {"type": "function", "function": {
        "name": name, "description": f"What {name} says, 说明", "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]}}}


TOOLS = [
    function("weather", city={"type": "string", "description": "the <city>"}, days={"type": "integer", "description": "how many"}),
    function("clock", zone={"type": "string", "description": "IANA's name"}),
]


def call(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": [
        {"id": f"call{i}", "type": "function", "function": {"name": name, "arguments": arguments}} for i, (name, arguments) in enumerate(calls)]}


QUESTION = {"role": "user", "content": "北京的天气？"}
SYSTEM = {"role": "system", "content": "Be brief."}
ARGUMENTS = {"city": "北京", "days": 2, "units": {"t": "{C}", "list": [1.5, True, None, "\"]}"]}}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call0", "name": "weather"}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIn 北京?"}

CONVERSATIONS = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "reasoning": [QUESTION, THOUGHT, {"role": "user", "content": "Yes."}],
    "called": [SYSTEM, QUESTION, call(("weather", ARGUMENTS)), RESULT],
    "two calls": [QUESTION, call(("weather", {"city": "上海"}), ("clock", {"zone": "Asia/Shanghai"})), RESULT, {**RESULT, "content": "09:00", "tool_call_id": "call1", "name": "clock"}],
    "answered": [QUESTION, call(("weather", ARGUMENTS)), RESULT, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And in 上海?"}],
    "text and call": [QUESTION, call(("clock", {}), content="One moment."), {**RESULT, "content": "09:00"}],
    "reasoning in a chain": [QUESTION, {**call(("weather", ARGUMENTS)), "reasoning_content": "I ask first."}, RESULT],
    "reasoning apart": [QUESTION, {"role": "assistant", "content": "In 北京?", "reasoning_content": "Hm."}, {"role": "user", "content": "Yes."}],
    "unfinished": [QUESTION, {"role": "assistant", "content": "It is"}],
    "unfinished with space": [SYSTEM, QUESTION, {"role": "assistant", "content": " The weather in 北京 is "}],
    "unfinished reasoning": [QUESTION, {"role": "assistant", "content": "<think>\nThe user"}],
    "unfinished after reasoning": [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is"}],
}


def render(template, messages, call_style, **options):
    bos, eos = TOKENS[template]
    text, empty = call_style
    messages = copy.deepcopy(messages)
    for message in messages:
        for c in message.get("tool_calls", []):
            if text:
                c["function"]["arguments"] = json.dumps(c["function"]["arguments"], ensure_ascii=False)
            if empty and message["content"] is None:
                message["content"] = ""
    source = (TESTDATA / f"{template}.jinja").read_text(encoding="utf-8")
    return render_jinja_template([messages], chat_template=source, bos_token=bos, eos_token=eos, **options)[0][0]


cases = []
for template in TOKENS:
    for name, messages in CONVERSATIONS.items():
        unfinished = name.startswith("unfinished")
        calls = any("tool_calls" in m for m in messages)
        for tools in (False, True):
            if tools and (template not in WRITES_TOOLS or unfinished) or template == "hermes" and not tools or calls and template == "smollm2":
                continue
            for thinking in (None, False, True):
                case = {"template": template, "conversation": name, "tools": tools, "continue": unfinished}
                options = {"tools": TOOLS if tools else None, "add_generation_prompt": not unfinished, "continue_final_message": unfinished}
                if thinking is not None:
                    case["enable_thinking"] = options["enable_thinking"] = thinking
                errors = []
                for style in CALL_STYLES if calls else CALL_STYLES[:1]:
                    try:
                        case["text"] = render(template, messages, style, **options)
                        break
                    except Exception as e:  # whatever a template does to a value it does not expect
                        errors.append(str(e))
                else:
                    case["error"] = errors[0]
                cases.append(case)

conversations = copy.deepcopy(CONVERSATIONS)
for messages in conversations.values():  # as OpenAI's API has them
    for message in messages:
        for c in message.get("tool_calls", []):
            c["function"]["arguments"] = json.dumps(c["function"]["arguments"], ensure_ascii=False)
out = {"tokens": TOKENS, "tools": TOOLS, "conversations": conversations, "cases": cases}
(TESTDATA / "prompts.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
print(f"{len(cases)} prompts, {sum('error' in c for c in cases)} refused")
