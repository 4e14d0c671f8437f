"""The interface as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from tests.serve.conftest import END, VOCABULARY

CHAT = [{"role": "user", "content": "The code of bako is 48-21.\nkey bako"}]
PROMPT = "The code of bako is 48-21. The code of"


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def greedy(module):
    def run(tokens: list[int], count: int) -> list[int]:
        out = module.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(tokens) :].tolist()

    return run


def test_completion_equals_what_the_model_writes_by_itself(client, text, greedy):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    expected = greedy(text.encode(PROMPT), 12)
    assert answer.choices[0].text == text.decode(expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(text.encode(PROMPT)), 12)


def test_prompts_of_every_form_and_several_at_once(client, text):
    ids = text.encode(PROMPT)
    options = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    one = client.completions.create(prompt=PROMPT, **options).choices[0].text
    for prompt in (ids, [PROMPT], [ids]):
        assert [c.text for c in client.completions.create(prompt=prompt, **options).choices] == [one]
    many = client.completions.create(prompt=[PROMPT, "key wug", PROMPT], echo=True, **options)
    assert [c.index for c in many.choices] == [0, 1, 2]
    assert many.choices[0].text == many.choices[2].text == PROMPT + one
    assert many.choices[1].text.startswith("key wug")
    assert many.usage.prompt_tokens == 2 * len(ids) + len(text.encode("key wug"))


def test_a_stream_is_the_answer_in_pieces(client):
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 20, "temperature": 0.9, "seed": 4}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(c.usage is None for c in chunks)
    assert len({c.id for c in chunks}) == 1


def test_usage_chunk_comes_last_and_only_where_asked_for(server, client):
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])


def test_samples_are_apart_and_a_seed_repeats_them(client):
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    first, again = (client.chat.completions.create(**options) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert len(set(texts)) == 3
    assert texts == [c.message.content for c in again.choices]
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts
    assert first.usage.prompt_tokens == again.usage.prompt_tokens  # one prompt, not three


def test_stop_strings_end_the_text_before_them(client):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    body = {"ignore_eos": True}
    whole = client.completions.create(extra_body=body, **options).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    cut = client.completions.create(stop=[stop, "never there"], extra_body=body, **options).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    chunks = client.completions.create(stop=stop, stream=True, extra_body=body, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text


def test_an_end_token_is_no_text(client):
    bias = {str(END): 100}
    answer = client.chat.completions.create(model="tiny", messages=CHAT, logit_bias=bias, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 1


def test_logit_bias_bans_and_demands(client, text):
    ids = text.encode(PROMPT)
    options = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    free = client.completions.create(**options).choices[0].logprobs
    assert len(free.top_logprobs[0]) == 5
    wanted = 500
    biased = client.completions.create(logit_bias={str(wanted): 100}, **options).choices[0].logprobs
    assert biased.tokens == [text.tokenizer.decode([wanted])]
    # Log-probabilities are those of the model: the bias decides what is drawn, not what is told.
    assert biased.token_logprobs[0] < free.token_logprobs[0]


def test_penalties_keep_a_sample_from_repeating_itself(client):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": 0}
    options["logit_bias"] = {"300": 8.0}
    body = {"ignore_eos": True}
    plain = client.completions.create(extra_body=body, **options).choices[0].logprobs.tokens
    penalised = client.completions.create(frequency_penalty=2, presence_penalty=2, extra_body=body, **options)
    assert len(set(penalised.choices[0].logprobs.tokens)) > 2 * len(set(plain))


def test_logprobs_of_a_chat_are_the_models(client, module, text):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    ids = text.chat(CHAT)
    with torch.inference_mode():
        expected = torch.log_softmax(module(torch.tensor([ids])).logits[0, -1], -1)
    first = answer.choices[0].logprobs.content[0]
    best = torch.topk(expected, 2)
    assert [t.logprob for t in first.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert first.token == text.tokenizer.decode([int(best.indices[0])])
    assert bytes(first.bytes).decode() == first.token
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_prefixes_are_reused_and_counted(client):
    messages = [{"role": "user", "content": "The label of piano is dax. " * 40 + "\nkey piano"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    tokens = second.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == (tokens - 1) // 64 * 64
    assert second.choices[0].message.content == first.choices[0].message.content


def test_models_tokenize_and_operation(server, client, text):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert ids == {"tokens": text.encode(PROMPT), "count": len(ids["tokens"]), "max_model_len": 2048}
        bare = http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
        assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": PROMPT}
        chat = http.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
        assert chat == text.chat(CHAT)
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json()["version"]
        info = http.get("/server_info").json()
        assert info["model"]["layers"] == 2
        assert "radix" in str(info["recipes"]["full"])
        assert http.post("/reset_prefix_cache").json() == {"success": True}
        assert http.get("/stats").json()["kv_bytes"] == {"host/pool": 0}
        metrics = http.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics
    assert "vllm:time_to_first_token_seconds_bucket" in metrics


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": [5] * 3000}, "prompt"),
        ({"prompt": [5], "max_tokens": 2048}, "max_tokens"),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [5], "n": 17, "temperature": 1}, "n"),
        ({"prompt": [5], "stop": ["x"] * 17}, "stop"),
        ({"prompt": [5], "logprobs": 21}, "logprobs"),
        ({"prompt": [5], "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": [5], "logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"prompt": [5], "temperature": -1}, "temperature"),
        ({"prompt": [5], "recipe": "secret"}, "recipe"),
        ({"prompt": [5], "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt": [5], "suffix": "x"}, "suffix"),
        ({"prompt": [5], "best_of": 3}, "best_of"),
        ({"prompt": [5], "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_will_not_do_is_refused_in_openais_form(server, body, param):
    with server.http() as http:
        reply = http.post("/v1/completions", json={"model": "tiny", **body})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_other_errors_have_that_form_too(server, client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="x")
    with server.http() as http:
        for reply in (
            http.post("/v1/completions", content=b"{not json", headers={"content-type": "application/json"}),
            http.get("/nowhere"),
            http.delete("/v1/models"),
            http.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "x"}]}),
        ):
            assert reply.status_code in (400, 404, 405)
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            assert reply.headers["x-request-id"].startswith("req-")
