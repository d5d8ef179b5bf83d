"""Uses a running server through frameworks that people put before OpenAI's API: instructor, litellm and langchain-openai, each with a
call for structured output and a streamed one. Exits with 1 at the first answer that is not as expected.

    python frameworks.py http://127.0.0.1:8080/v1
"""

import os
import sys
import typing

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices

import instructor
import litellm
import openai
import pydantic
from langchain_openai import ChatOpenAI

MODEL = "SmolLM2-135M-Instruct"
STORY = [{"role": "user", "content": "Tell me about rivers."}]
PERSON = [{"role": "user", "content": "Anna is 31 years old and likes tea. Extract the person."}]


class Person(pydantic.BaseModel):
    """A person."""

    model_config = pydantic.ConfigDict(extra="forbid")  # strict: additionalProperties false

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)
    likes: typing.Literal["tea", "coffee"]


def expect(what, holds, got=""):
    if not holds:
        raise SystemExit(f"FAIL {what}: {got}")
    print(f"ok   {what}")


def with_instructor(base):
    plain = openai.OpenAI(base_url=base, api_key="any", max_retries=0, timeout=120)
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(plain, mode=mode)
        person = client.chat.completions.create(
            model=MODEL, messages=PERSON, response_model=Person, temperature=0, max_tokens=80, max_retries=0
        )
        expect(f"instructor, {mode.name}: a Person", isinstance(person, Person), person)
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(client.chat.completions.create_partial(model=MODEL, messages=PERSON, response_model=Person, temperature=0, max_tokens=80))
    expect("instructor: partial objects while it is streamed", len(parts) > 1 and parts[-1].name, parts[-1:])


def with_litellm(base):
    common = {"model": "openai/" + MODEL, "api_base": base, "api_key": "any", "temperature": 0}
    reply = litellm.completion(messages=PERSON, response_format=Person, max_tokens=80, **common)
    person = Person.model_validate_json(reply.choices[0].message.content)
    expect("litellm, response_format: a Person", 0 <= person.age <= 150, person)
    expect("litellm: usage", reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens, reply.usage)
    whole = litellm.completion(messages=STORY, max_tokens=16, **common).choices[0].message.content
    chunks = list(litellm.completion(messages=STORY, max_tokens=16, stream=True, **common))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expect("litellm: a stream gives the same text", text == whole, (text, whole))
    expect("litellm: with a reason to finish", chunks[-1].choices[0].finish_reason in ("length", "stop"), chunks[-1])


def with_langchain(base):
    model = ChatOpenAI(model=MODEL, base_url=base, api_key="any", temperature=0, max_tokens=80, max_retries=0, timeout=120)
    for method in ("json_schema", "function_calling"):
        person = model.with_structured_output(Person, method=method).invoke(PERSON[0]["content"])
        expect(f"langchain-openai, {method}: a Person", isinstance(person, Person), person)
    short = model.bind(max_tokens=16)
    whole = short.invoke(STORY[0]["content"]).content
    chunks = list(short.stream(STORY[0]["content"]))
    text = "".join(c.content for c in chunks)
    expect("langchain-openai: a stream gives the same text", text == whole and len(chunks) > 2, (text, whole))


def main():
    base = sys.argv[1]
    with_instructor(base)
    with_litellm(base)
    with_langchain(base)


if __name__ == "__main__":
    main()
