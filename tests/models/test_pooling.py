"""Pooling as sentence-transformers lays it out: reading the files, and every mode against its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_hf_text import byte_level
from tests.parity.families import make
from tokenizers.processors import TemplateProcessing

import winnow
from winnow.models.load import load_model
from winnow.models.pooling import MODES, Pooling, pooling_of
from winnow.models.text import Text

FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def lay_out(
    directory: Path,
    *modes: str,
    normalise: bool = True,
    flags: bool = True,
    sentences: dict[str, Any] | None = None,
    texts: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **pooling: Any,
) -> Path:
    """Put sentence-transformers' files beside a model."""
    kinds = ["Transformer", "Pooling", "Normalize"][: 3 if normalise else 2]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    chosen = {flag: mode in modes for mode, flag in FLAGS.items()} if flags else {"pooling_mode": list(modes)}
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({**chosen, **pooling}))
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(sentences or {}))
    (directory / "sentence_bert_config.json").write_text(json.dumps(texts or {}))
    if config:
        known = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(known | config))
    return directory


def plain(mode: str, states_NK: torch.Tensor, skip: int) -> torch.Tensor:
    """The formula of a mode over the tokens that count, written out."""
    kept = [(place + 1, row) for place, row in enumerate(states_NK.double()) if place >= skip]
    rows = [row for _, row in kept]
    total = sum(rows[1:], rows[0])
    weighted = sum(place * row for place, row in kept)
    return {
        "cls": rows[0],
        "lasttoken": rows[-1],
        "max": torch.stack(rows).max(0).values,
        "mean": total / len(rows),
        "mean_sqrt_len_tokens": total / len(rows) ** 0.5,
        "weightedmean": weighted / sum(place for place, _ in kept),
    }[mode].float()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", [0, 3])
def test_every_mode_equals_its_formula_whatever_the_chunks(mode: str, skip: int) -> None:
    states = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    want = plain(mode, states, skip)
    for cuts in ([11], [1, 10], [2, 2, 7], [1] * 11):
        pool = Pooling(modes=(mode,), width=5).start(11, skip)
        for chunk in states.split(cuts):
            pool.take(chunk)
        torch.testing.assert_close(pool.result(), want, rtol=1e-5, atol=1e-6)


def test_several_modes_are_joined_and_cut_before_they_are_normalised() -> None:
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    pooling = Pooling(modes=("mean", "lasttoken"), width=3, normalise=True, shorter=(4,))
    pool = pooling.start(4, dimensions=4)
    pool.take(states)
    joined = torch.cat([states.mean(0), states[-1]])[:4]
    torch.testing.assert_close(pool.result(), joined / joined.norm())


@pytest.mark.parametrize("flags", [True, False], ids=["older files", "newer files"])
def test_what_is_read_from_a_directory(tmp_path: Path, flags: bool) -> None:
    make("qwen3").save_pretrained(tmp_path)
    lay_out(
        tmp_path,
        "max",
        "lasttoken",
        flags=flags,
        sentences={"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "document"},
        texts={"max_seq_length": 40, "do_lower_case": False},
        config={"matryoshka_dimensions": [32, 16]},
        include_prompt=False,
    )
    assert pooling_of(load_model(tmp_path)[0]) == Pooling(
        modes=("max", "lasttoken"),
        width=48,
        normalise=True,
        shorter=(16, 32),
        prompts={"query": "find: ", "document": ""},
        default_prompt="document",
        include_prompt=False,
        longest=40,
    )


def test_prompts_stand_before_the_text_and_their_tokens_may_be_left_out() -> None:
    words = Text(byte_level())
    words.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 256)]
    )
    pooling = Pooling(modes=("mean",), width=4, prompts={"query": "ask: "}, include_prompt=False)
    ids, skip = pooling.tokens("who", "query", lambda: words)
    assert words.decode(ids) == "ask: who"
    # The token that ends a whole text is none of the prompt's.
    assert (len(ids), ids[-1], skip) == (9, 256, 5)
    assert words.decode(ids[skip:]) == "who"
    assert pooling.tokens("who", None, lambda: words) == (words.encode("who"), 0)
    with pytest.raises(ValueError, match="no prompt 'other'; there are: query"):
        pooling.tokens("who", "other", lambda: words)
    with pytest.raises(ValueError, match="before text"):
        pooling.tokens([1, 2], "query", lambda: words)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "modules.json").unlink(), "without modules.json"),
        (lambda d: (d / "modules.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "modules.json").write_text('{"a": 1}'), "is damaged"),
        (lambda d: (d / "modules.json").write_text('[{"path": ""}]'), "is damaged"),
        (lambda d: (d / "1_Pooling" / "config.json").write_text("[]"), "is damaged"),
        (lambda d: (d / "1_Pooling" / "config.json").unlink(), "is missing"),
        (
            lambda d: (d / "1_Pooling" / "config.json").write_text('{"pooling_mode": "attention"}'),
            "unknown pooling 'attention'",
        ),
        (
            lambda d: (d / "modules.json").write_text(
                json.dumps(
                    [{"type": f"x.{kind}", "path": ""} for kind in ("Transformer", "Pooling", "Dense")]
                )
            ),
            "modules are Transformer, Pooling, Dense",
        ),
        (lambda d: (d / "sentence_bert_config.json").write_text('{"do_lower_case": true}'), "lower case"),
    ],
)
def test_a_model_that_cannot_embed_says_why_and_still_generates(tmp_path: Path, damage, message: str) -> None:
    make("llama").save_pretrained(tmp_path)
    damage(lay_out(tmp_path, "mean"))
    llm = winnow.load(tmp_path)
    with pytest.raises(ValueError, match=message):
        llm.embed([[1, 2, 3]])
    assert len(llm.generate([1, 2, 3], max_new_tokens=2).token_ids) == 2


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    pooling = Pooling(modes=("mean",), width=8, shorter=range(1, 8), longest=5)
    with pytest.raises(ValueError, match="at most 5 tokens"):
        pooling.start(6)
    with pytest.raises(ValueError, match="empty"):
        pooling.start(3, skip=3)
    with pytest.raises(ValueError, match="cut to 9: but to 1 up to 7"):
        pooling.start(3, dimensions=9)
    with pytest.raises(ValueError, match="matryoshka"):
        Pooling(modes=("mean",), width=8).start(3, dimensions=4)


def test_weights_without_a_head_embed_and_refuse_to_generate(tmp_path: Path) -> None:
    """As embedding models are published: the decoder alone, its names without a prefix."""
    model = make("mistral")
    model.base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 weights, the first is lm_head"):
        winnow.load(tmp_path)
    lay_out(tmp_path, "lasttoken")
    llm, again = winnow.load(tmp_path), winnow.load(tmp_path)
    assert llm.model.fingerprint == again.model.fingerprint
    states = model.base_model(torch.tensor([[3, 1, 4]])).last_hidden_state[0, -1]
    torch.testing.assert_close(llm.embed([3, 1, 4]), states / states.norm(), rtol=1e-4, atol=1e-5)
    for act in (llm.generate, llm.workers):
        with pytest.raises(ValueError, match="embeds texts and generates none"):
            act([3, 1, 4])
