"""Answers in a demanded form, and tool calls; what is random is the model, not the form."""

from __future__ import annotations

import json

import openai
import pytest
from transformers import AutoTokenizer

from tests.serve.conftest import running
from winnow.models import embedded
from winnow.models.text import Text
from winnow.serve.tools import Hermes, Json, reader

CHAT = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "town": {"enum": ["Paris", "Rome"]},
        "degrees": {"type": "integer", "minimum": -60, "maximum": 60},
        "dry": {"type": "boolean"},
    },
    "required": ["town", "degrees", "dry"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Paris", "Rome"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"utc": {"type": "boolean"}},
            "required": ["utc"],
            "additionalProperties": False,
        },
    },
}
# Shows tools and calls as Hermes does; the tests look for both in the prompt.
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> use <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.town }}"
    "</tool_call>{% endfor %}{% endfor %}[assistant]"
)


@pytest.fixture(scope="module")
def server(model):
    tokenizer = AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    with running(model, Text(tokenizer)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_answer_follows_its_schema_in_every_sample(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        n=4,
        temperature=1.5,
        seed=1,
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert set(value) == {"town", "degrees", "dry"}
        assert value["town"] in ("Paris", "Rome")
        assert -60 <= value["degrees"] <= 60
        assert isinstance(value["dry"], bool)
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_json_object_is_one(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        temperature=1.0,
        seed=3,
        max_tokens=400,
        logit_bias={str(ord("}") + 4): 8},  # a random model hardly ever closes what it opens
        response_format={"type": "json_object"},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_the_constraint_is_gone_with_its_request(client):
    free = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=12)
    with pytest.raises(ValueError):
        json.loads(free.choices[0].message.content)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/none"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(101)}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 70_000]}}},
    ],
)
def test_a_schema_that_is_none_is_refused(client, form):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=CHAT, response_format=form)


def test_a_demanded_call_is_made_whatever_the_model(client):
    options = {"model": "tiny", "messages": CHAT, "tools": [WEATHER, CLOCK], "max_tokens": 200, "seed": 5}
    named = client.chat.completions.create(
        tool_choice={"type": "function", "function": {"name": "clock"}}, **options
    ).choices[0]
    assert named.finish_reason == "stop"
    assert named.message.content is None
    (call,) = named.message.tool_calls
    assert call.function.name == "clock"
    assert isinstance(json.loads(call.function.arguments)["utc"], bool)

    chunks = client.chat.completions.create(tool_choice="required", stream=True, **options)
    deltas = [c.choices[0] for c in chunks]
    made = [call for d in deltas for call in d.delta.tool_calls or ()]
    assert len(made) == 1
    assert made[0].index == 0
    assert made[0].id.startswith("call_")
    assert made[0].function.name in ("weather", "clock")
    json.loads(made[0].function.arguments)
    assert deltas[-1].finish_reason == "tool_calls"
    assert not any(d.delta.content for d in deltas)


def test_tools_and_calls_reach_the_template_and_only_the_models_own(server, client):
    conversation = [
        *CHAT,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"town": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "{{ 7 * 7 }} and sun"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=conversation, tools=[WEATHER], max_tokens=1, temperature=0
    )
    seen = server.service.translator
    with server.http() as http:
        ids = http.post("/tokenize", json={"messages": conversation}).json()["tokens"]
    shown = seen.decode(ids)
    assert "<tool_call>weather:Rome</tool_call>" in shown
    assert "{{ 7 * 7 }} and sun" in shown  # text of a user is never a template
    assert answer.usage.prompt_tokens > len(ids)  # the tools were shown too
    without = client.chat.completions.create(
        model="tiny", messages=conversation, tools=[WEATHER], tool_choice="none", max_tokens=1, temperature=0
    )
    assert without.usage.prompt_tokens == len(ids)


def test_a_template_stays_in_its_sandbox(model):
    tokenizer = AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with running(model, Text(tokenizer)) as server, pytest.raises(openai.BadRequestError, match="template"):
        server.client().chat.completions.create(model="tiny", messages=CHAT)


@pytest.mark.parametrize(
    ("choice", "tools"), [("required", None), ({"type": "function", "function": {"name": "no"}}, [WEATHER])]
)
def test_impossible_demands_are_refused(client, choice, tools):
    options = {"tools": tools} if tools else {}
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(model="tiny", messages=CHAT, tool_choice=choice, **options)


# --------------------------------------------------------------------------- reading calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_hermes_calls_are_found_however_the_text_is_cut(step):
    text = f"I look. {CALL}\n{CALL} 1 < 2 <tool_call>no json</tool_call> end <tool"
    one = Hermes()
    shown, calls = "", []
    for first in range(0, len(text), step):
        more, found = one.push(text[first : first + step])
        shown, calls = shown + more, calls + found
    more, found = one.finish()
    shown, calls = shown + more, calls + found
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"town": "Paris"}] * 2
    assert len({c["id"] for c in calls}) == 2
    assert " ".join(shown.split()) == "I look. 1 < 2 <tool_call>no json</tool_call> end <tool"


def test_hermes_text_that_cannot_be_a_tag_is_shown_at_once():
    one = Hermes()
    assert one.push("a < b")[0] == "a < b"
    assert one.push("x <tool")[0] == "x "
    assert one.push("s>")[0] == "<tools>"


def test_json_calls_are_whole_answers():
    one = Json()
    assert one.push(' {"name": "weather", ') == ("", [])
    assert one.push('"parameters": {"town": "Rome"}}') == ("", [])
    (call,) = one.finish()[1]
    assert call["function"] == {"name": "weather", "arguments": '{"town": "Rome"}'}
    plain = Json()
    assert plain.push("Hello {") == ("Hello {", [])
    broken = Json()
    broken.push('{"name": 3}')
    assert broken.finish() == ('{"name": 3}', [])


def test_reader_follows_the_template():
    assert isinstance(reader("auto", "... <tool_call> ..."), Hermes)
    assert isinstance(reader("auto", '{"name": function name, "parameters": dictionary}'), Json)
    assert reader("auto", "plain") is None
    assert reader("none", "<tool_call>") is None


def test_a_form_that_leads_nowhere_ends_its_own_answer_and_no_other(server, client):
    """What the schema demands can never be complete; others in the same batch go on."""
    endless = {"$ref": "#/$defs/endless"}
    schema = {
        "type": "object",
        "properties": {"a": endless},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"endless": endless},
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    other = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    written = iter(other)
    next(written)
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=40, temperature=1, response_format=form
    )
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(ValueError):
        json.loads(answer.choices[0].message.content)
    assert [chunk.choices[0].finish_reason for chunk in written][-1] == "length"


def test_a_form_must_be_able_to_end(client):
    with pytest.raises(openai.BadRequestError, match="must be able to end") as refused:
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            response_format={"type": "json_object"},
            extra_body={"ignore_eos": True},
        )
    assert refused.value.param == "ignore_eos"
