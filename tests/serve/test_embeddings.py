"""``/v1/embeddings`` as OpenAI's own client sees it, with tiny embedding models in directories."""

from __future__ import annotations

import base64
import concurrent.futures
import struct
import threading

import openai
import pytest
import torch
import transformers as hf

from tests.models.test_pooling import lay_out, plain
from tests.serve.conftest import VOCABULARY, running
from tests.serve.test_fuzz import fuzz
from winnow.models.load import load_model
from winnow.recipe import Recipe

TEXTS = ["The code of bako is 48-21.", "key bako", "The label of piano is dax. " * 30]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "eos_token_id": 260,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(3)
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, tie_word_embeddings=True)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return lay_out(
        path,
        "lasttoken",
        sentences={"prompts": {"query": "key ", "document": ""}},
        config={"matryoshka_dimensions": [16, 32]},
    )


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def server(loaded):
    with running(*loaded) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def vectors(answer) -> torch.Tensor:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return torch.tensor([one.embedding for one in answer.data])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_vectors_are_those_of_transformers(client, directory, loaded):
    model, words = hf.AutoModel.from_pretrained(directory).eval(), loaded[1]
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    wanted = []
    for text in TEXTS:
        with torch.inference_mode():
            states = model(torch.tensor([words.encode(text)])).last_hidden_state[0]
        pooled = plain("lasttoken", states, 0)
        wanted.append(pooled / pooled.norm())
    same(vectors(answer), torch.stack(wanted))
    tokens = sum(len(words.encode(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert answer.model == "tiny"


def test_every_form_of_input_and_of_answer(client, loaded):
    words = loaded[1]
    want = vectors(client.embeddings.create(model="tiny", input=TEXTS))
    # Asked for by name, base64 stays as it came: float32, little-endian.
    raw = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="base64").data
    values = [struct.unpack("<64f", base64.b64decode(one.embedding)) for one in raw]
    same(torch.tensor(values), want)
    ids = [words.encode(text) for text in TEXTS]
    same(vectors(client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")), want)
    same(vectors(client.embeddings.create(model="tiny", input=ids)), want)
    for one in (TEXTS[1], ids[1], [TEXTS[1]], [ids[1]]):
        same(vectors(client.embeddings.create(model="tiny", input=one)), want[1:2])


def test_prompts_and_dimensions(client):
    def ask(text: str, **options) -> torch.Tensor:
        return vectors(client.embeddings.create(model="tiny", input=text, **options))[0]

    same(ask("bako", extra_body={"prompt_name": "query"}), ask("key bako"))
    whole = ask("key bako")
    assert len(whole) == 64
    short = ask("key bako", dimensions=16)
    same(short, whole[:16] / whole[:16].norm())
    same(ask("key bako", dimensions=64), whole)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": [1, "a"]}, "input.str", ""),
        ({"input": [VOCABULARY]}, "input", "vocabulary"),
        ({"input": [-1]}, "input", ""),
        ({"input": [5] * 3000}, "input", "at most 2048"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a", "dimensions": 20}, "dimensions", "16, 32"),
        ({"input": "a", "dimensions": 0}, "dimensions", ""),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", ""),
        ({"input": "a", "prompt_name": "poem"}, "prompt_name", "query, document"),
        ({"input": [5], "prompt_name": "query"}, "prompt_name", "before text"),
        ({"input": "a", "recipe": "full"}, "recipe", ""),
    ],
)
def test_what_will_not_do_is_refused(server, body, param, said):
    with server.http() as http:
        reply = http.post("/v1/embeddings", json={"model": "tiny", **body})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].startswith(param.partition(".")[0])
    assert said in error["message"]


def test_the_server_says_what_it_embeds(server, client):
    with server.http() as http:
        told = http.get("/server_info").json()
    assert told["embeddings"] == {
        "dimensions": 64,
        "pooling": ["lasttoken"],
        "normalised": True,
        "prompts": ["query", "document"],
    }
    assert list(told["recipes"]) == ["full"]
    with pytest.raises(openai.BadRequestError, match="not served"):
        client.completions.create(model="tiny", prompt="x", extra_body={"recipe": "embeddings"})


def test_more_texts_than_the_queue_holds(loaded):
    with running(*loaded, max_queue=4, max_num_seqs=3, max_num_batched_tokens=128) as server:
        texts = [f"key {number}" for number in range(60)]
        many = vectors(server.client().embeddings.create(model="tiny", input=texts))
        one = vectors(server.client().embeddings.create(model="tiny", input=texts[41]))
        same(many[41:42], one)
        counters = server.worker.counters
        assert counters.ended == {"finished": 61}
        assert counters.generated_tokens == 0
        assert counters.prompt_tokens == counters.computed_tokens > 0


def test_a_long_text_lets_others_write_and_leaves_nothing(loaded):
    """It is read in chunks; between two of them a running answer goes on."""
    with running(*loaded, max_num_batched_tokens=64, prefix_caching=False) as server:
        client = server.client()
        stream = client.completions.create(
            model="tiny", prompt=[5], max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        written = iter(stream)
        next(written)
        before = server.worker.counters.generated_tokens
        done = threading.Event()

        def drain() -> None:
            for _ in written:
                if done.is_set():
                    return

        thread = threading.Thread(target=drain)
        thread.start()
        client.embeddings.create(model="tiny", input=[7] * 1600)
        during = server.worker.counters.generated_tokens - before
        done.set()
        thread.join()
        stream.response.close()
        assert during >= 1600 // 64
        server.idle()
        assert server.worker.memory.held() == 0


def test_texts_are_preempted_and_come_back(loaded):
    """Two long texts and a memory for less than both: one waits or goes to disk, both are right."""
    ids = [[5 + i % 50 for i in range(1500)], [9 + i % 70 for i in range(1500)]]
    with running(*loaded) as server:
        want = [vectors(server.client().embeddings.create(model="tiny", input=one))[0] for one in ids]
        need = server.worker.engines["full"].bytes_of(1600)
    with running(*loaded, kv_memory=int(1.6 * need), max_num_batched_tokens=64) as server:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            got = pool.map(lambda one: server.client().embeddings.create(model="tiny", input=one), ids)
            for answer, wanted in zip(got, want, strict=True):
                same(vectors(answer)[0], wanted)
        assert server.worker.memory.peak <= int(1.6 * need)


def test_a_client_that_vanishes_frees_its_memory(loaded):
    with running(*loaded, max_num_batched_tokens=16) as server:
        hasty = server.client(timeout=0.2)
        with pytest.raises(openai.APITimeoutError):
            hasty.embeddings.create(model="tiny", input=[[7] * 2000] * 64)
        server.idle(10)
        assert server.worker.memory.held() == 0
        assert set(server.worker.counters.ended) <= {"cancelled", "finished"}
        assert server.worker.counters.ended["cancelled"] > 0


def test_a_model_without_a_head_only_embeds(tmp_path, tokenizer):
    torch.manual_seed(4)
    hf.MistralModel(hf.MistralConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, text = load_model(lay_out(tmp_path, "mean", normalise=False))
    with running(model, text) as server:
        client = server.client()
        got = vectors(client.embeddings.create(model="tiny", input="key bako"))[0]
        with torch.inference_mode():
            ids = torch.tensor([text.encode("key bako")])
            states = hf.AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state[0]
        same(got, plain("mean", states, 0))
        with pytest.raises(openai.BadRequestError, match="generates none"):
            client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.BadRequestError, match="generates none"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_a_generator_says_why_it_does_not_embed(start):
    with pytest.raises(
        openai.BadRequestError, match="does not embed texts: it was made in memory"
    ) as refused:
        start().client().embeddings.create(model="tiny", input="x")
    assert refused.value.code == "model_not_supported"


@pytest.mark.slow
def test_the_operation_keeps_its_word(server):
    _, answered = fuzz(server, path="/v1/embeddings")
    assert {status for _, status in answered} == {200, 400}


def test_a_recipe_may_not_take_the_name(loaded):
    with pytest.raises(ValueError, match="rename it"), running(*loaded, recipes={"embeddings": Recipe()}):
        pass
