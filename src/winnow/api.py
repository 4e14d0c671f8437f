"""The front door: ``winnow.load`` and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from winnow import methods
from winnow.chunks import Chunks, divide, split
from winnow.engine.embedding import Embedder
from winnow.engine.engine import Engine, Event, Progress
from winnow.engine.repair import Division
from winnow.engine.request import Result, SamplingParams
from winnow.engine.scheduler import Limits
from winnow.engine.session import Session
from winnow.engine.workers import Hogwild, WorkersResult
from winnow.episodes import Episodes
from winnow.kernels.backend import Backend
from winnow.models.load import Runner, load_model
from winnow.models.pooling import Pooling, pooling_of
from winnow.models.swiftkv.model import transformed
from winnow.models.text import Text
from winnow.recipe import Recipe
from winnow.store import files

__all__ = ["LLM", "ChatSession", "TextSession", "load", "load_session"]

Prompt = str | Seq[int] | Chunks
Message = Mapping[str, str]


def load(
    model: Any,
    *,
    recipe: Recipe | str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    runner: Runner = "auto",
    backend: Backend = "auto",
    max_num_batched_tokens: int = 4096,
    max_num_seqs: int = 64,
    long_positions: bool = False,
) -> LLM:
    """Load a model and put a recipe on it.

    Parameters
    ----------
    model : str, Path or transformers model
        A directory, a hub name (the only case that may use a network), ``"embedded"``, or a
        ``transformers`` model already in memory, which stays usable.
    recipe : Recipe, str, Path or None
        A recipe, a YAML file, or the name of a method or packaged recipe; None is full
        attention with everything kept.
    dtype, device : optional
        Default: the dtype of the weights; a CUDA device where there is one.
    runner : {"auto", "general", "fused"}
        Which code walks the layers; ``auto`` takes the fused one where its logits agree.
    backend : {"auto", "native", "triton", "reference"}
        Kernel implementation to demand.
    max_num_batched_tokens, max_num_seqs : int
        Limits of one engine step.
    long_positions : bool
        Let a model with longrope scaling use its whole length, on the frequencies of long
        prompts; without it the model stays within its original length.

    Raises
    ------
    ValueError
        Unsupported or damaged model, unknown recipe: one line that says what to do.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe() if recipe is None else methods.load(recipe)
    language_model, text = load_model(
        model, dtype=dtype, device=device, runner=runner, long_positions=long_positions
    )
    language_model = transformed(language_model, recipe.generation)
    limits = Limits(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
    return LLM(language_model, text, recipe, limits, backend)


def load_session(path: str | Path, llm: LLM | None = None) -> TextSession:
    """Open a session that ``session.save`` wrote.

    Parameters
    ----------
    path : str or Path
    llm : LLM or None
        The model and recipe to continue with, which must be those of the file. None loads the
        model by the name in the file (which must then be a directory, hub name or ``embedded``)
        with the recipe that is stored in it.
    """
    if llm is None:
        header = files.read_header(Path(path))
        llm = load(header["model_name"], recipe=Recipe.from_yaml(header["recipe_yaml"]))
    return llm.load_session(path)


class LLM:
    """A model under a recipe. Made by :func:`load`."""

    def __init__(
        self, model: Any, text: Text | None, recipe: Recipe, limits: Limits, backend: Backend
    ) -> None:
        self.model = model
        self.text = text
        self.recipe = recipe
        self.engine = Engine(
            model, recipe, limits=limits, backend=backend, words=None if text is None else text.stream
        )

    # ------------------------------------------------------------------ text and tokens

    def tokens(self, prompt: Prompt, *, special: bool = True) -> list[int]:
        """Token ids of a prompt; ids pass through. ``special`` adds a begin token."""
        return self.divided(prompt, special=special)[0]

    def divided(self, prompt: Prompt, *, special: bool = True) -> tuple[list[int], Division | None]:
        """Token ids of a prompt, and how they divide into chunks where it is given, or found, in some."""
        part = None if self.engine.repair is None else self.engine.repair.part
        if isinstance(prompt, str) and part is not None and part.separator is not None:
            prompt = split(prompt, part.separator)
        if isinstance(prompt, str):
            return self._text().encode(prompt, special=special), None
        if not isinstance(prompt, Chunks):
            return [int(t) for t in prompt], None
        return divide(prompt, self.text, special=special)

    def _text(self) -> Text:
        if self.text is None:
            raise ValueError("this model came without a tokenizer; give token ids instead of text")
        return self.text

    # ------------------------------------------------------------------ requests

    @overload
    def generate(self, prompts: Prompt, **options: Any) -> Result: ...
    @overload
    def generate(self, prompts: Seq[str] | Seq[Seq[int]] | Seq[Chunks], **options: Any) -> list[Result]: ...
    def generate(
        self,
        prompts: Prompt | Seq[str] | Seq[Seq[int]] | Seq[Chunks],
        *,
        progress: Progress | None = None,
        salt: str = "",
        **options: Any,
    ) -> Result | list[Result]:
        """Generate for one prompt or for many at once.

        Parameters
        ----------
        prompts : str, list of int, Chunks, or a list of one of these
            One prompt gives one :class:`Result`; a list gives a list in the same order.
        progress : callable or None
            Called after each step with prompt tokens done, in all, and tokens generated.
        salt : str
            Requests of different salts share nothing through a pool.
        **options
            Fields of :class:`SamplingParams`: ``max_new_tokens``, ``temperature``, ``top_p``,
            ``top_k``, ``min_p``, ``seed``, ``stop``, ``ignore_eos``, ``n``, ``logprobs``.
        """
        many = _many(prompts)
        batch: list[Any] = list(prompts) if many else [prompts]  # type: ignore[arg-type]
        params = sampling(options)
        given = [self.divided(prompt) for prompt in batch]
        results: list[Result] = []
        try:
            for tokens, division in given:
                results.append(self.engine.submit(tokens, params, salt=salt, division=division))
        except ValueError:
            for result in results:
                self.engine.cancel(result)
            raise
        for _ in self.engine.events(progress):
            pass
        return results if many else results[0]

    def stream(
        self, prompt: Prompt, *, progress: Progress | None = None, salt: str = "", **options: Any
    ) -> Iterator[Event]:
        """Generate for one prompt, token by token."""
        tokens, division = self.divided(prompt)
        self.engine.submit(tokens, sampling(options), salt=salt, division=division)
        return self.engine.events(progress)

    def embed(
        self,
        texts: str | Seq[int] | Seq[str] | Seq[Seq[int]],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
    ) -> Tensor:
        """Vectors of texts, by an embedding model; full attention whatever the recipe.

        Parameters
        ----------
        texts : str, list of int, or a list of one of these
        prompt_name : str or None
            Which of the model's prompts stands before each text; None is its default one. Token ids get none.
        dimensions : int or None
            Cut the vectors to so many, where the model was trained for that.
        pooling : Pooling or None
            How hidden states become a vector; None is what the model says.

        Returns
        -------
        Tensor
            Float32 on the CPU: ``[E]`` for one text, ``[M, E]`` for a list of them.

        Raises
        ------
        ValueError
            The model is no embedding model, or a text or parameter is none that it takes.
        """
        how = pooling or pooling_of(self.model)
        many = _many(texts)
        batch: list[Any] = list(texts) if many else [texts]
        given = [how.tokens(one, prompt_name, self._text) for one in batch]
        pools = [how.start(len(tokens), skip, dimensions) for tokens, skip in given]
        embedder = Embedder(self.model, limits=self.engine.limits, backend=self.engine.backend)
        try:
            for (tokens, _), pool in zip(given, pools, strict=True):
                embedder.read(tokens, pool)
        except ValueError:
            embedder.abort()
            raise
        for _ in embedder.events():
            pass
        vectors_ME = torch.stack([pool.result() for pool in pools])
        return vectors_ME if many else vectors_ME[0]

    def chat(self, messages: Seq[Message], **options: Any) -> Result:
        """Answer a conversation given as ``{"role": ..., "content": ...}`` messages."""
        return self.generate(self._text().chat(messages), **options)

    def workers(self, prompt: Prompt, how: Hogwild | None = None, **options: Any) -> WorkersResult:
        """Let several workers answer one prompt together, reading each other's tokens at once.

        Parameters
        ----------
        prompt : str or list of int
        how : Hogwild or None
            Names, layout of the shared cache and messages; None takes two workers.
        **options
            As in :meth:`generate`; ``max_new_tokens`` is per worker.

        Raises
        ------
        ValueError
            If this model has a recipe: the workers' cache knows none.
        """
        self.engine.check_generates()
        if self.recipe != Recipe(name=self.recipe.name):
            raise ValueError(
                "workers share a cache of their own, without a recipe; load the model without one"
            )
        text = self.text
        return (how or Hogwild()).run(
            self.model,
            self.tokens(prompt),
            sampling(options),
            encode=(lambda _: []) if text is None else lambda part: text.encode(part, special=False),
            decode=(lambda _: "") if text is None else text.decode,
            backend=self.engine.backend,
        )

    # ------------------------------------------------------------------ sessions

    def session(self) -> TextSession:
        """Start a multi-turn session."""
        return TextSession(self, Session(self.engine))

    def read(self, prompt: Prompt, *, probe: Prompt = ()) -> TextSession:
        """A session that has read a prompt and answered nothing yet.

        Parameters
        ----------
        prompt : str or list of int
        probe : str or list of int
            Text for a recipe whose compression reads one over the entries before it acts.
        """
        session = Session(self.engine)
        try:
            session.read(self.tokens(prompt), probe=self.tokens(probe, special=False))
        except BaseException:
            session.close()
            raise
        return TextSession(self, session)

    def episodes(self, history: Seq[str], **options: Any) -> Episodes:
        """One compressed cache per topic of a long conversation; see :class:`winnow.episodes.Episodes`."""
        return Episodes(self, history, **options)

    def load_session(self, path: str | Path) -> TextSession:
        """Open a saved session with this model and recipe."""
        return TextSession(self, Session.load(self.engine, path))


class TextSession:
    """A :class:`Session` that speaks text as well as tokens."""

    def __init__(self, llm: LLM, session: Session) -> None:
        self._llm = llm
        self._session = session

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: prompts and answers."""
        return self._session.tokens

    def _new(self, prompt: Prompt) -> tuple[list[int], Division | None]:
        # A begin token stands only where the sequence begins.
        return self._llm.divided(prompt, special=not self._session.tokens)

    def generate(self, prompt: Prompt, *, progress: Progress | None = None, **options: Any) -> Result:
        """Append a prompt, generate, keep both for the next turn."""
        tokens, division = self._new(prompt)
        return self._session.run(tokens, sampling(options), progress, division=division)

    def stream(self, prompt: Prompt, *, progress: Progress | None = None, **options: Any) -> Iterator[Event]:
        """As :meth:`generate`, token by token."""
        tokens, division = self._new(prompt)
        return self._session.stream(tokens, sampling(options), progress, division=division)

    def fork(self) -> TextSession:
        """A session that starts from this one's context without computing it again."""
        return TextSession(self._llm, self._session.fork())

    def bytes_stored(self) -> dict[str, int]:
        """Measured KV bytes held now, by ``tier/codec``."""
        return self._session.bytes_stored()

    def save(self, path: str | Path) -> None:
        """Write the session to disk, atomically; see :meth:`Session.save`."""
        self._session.save(path)

    def close(self) -> None:
        """Free the entries."""
        self._session.close()

    def __enter__(self) -> TextSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ChatSession:
    """A conversation that computes only what each message adds.

    The chat template is applied to the whole conversation. What its tokens share with those of
    the session is not computed again; the session is rewound to there (a template may write an
    answer otherwise than the model did), or starts afresh where a compression forbids that.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._messages: list[dict[str, str]] = []
        self._session = Session(llm.engine)

    def stream(self, content: str, *, progress: Progress | None = None, **options: Any) -> Iterator[Event]:
        """Send a user message and stream the answer, which joins the conversation at its end."""
        messages = [*self._messages, {"role": "user", "content": content}]
        ids, seen = self._llm._text().chat(messages), self._session.tokens
        differ = (i for i, (a, b) in enumerate(zip(ids, seen, strict=False)) if a != b)
        common = min(next(differ, len(seen)), len(seen), len(ids) - 1)
        try:
            self._session.rewind(common)
        except ValueError:
            self._session.close()
            self._session, common = Session(self._llm.engine), 0
        ids = ids[common:]
        text = ""
        for event in self._session.stream(ids, sampling(options), progress):
            text = event.sample.text
            yield event
        self._messages = [*messages, {"role": "assistant", "content": text}]

    def close(self) -> None:
        """Free the entries."""
        self._session.close()


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """Options as a user gives them, checked: a lone stop string becomes a tuple."""
    values = dict(options)
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = (stop,)
    elif stop is not None:
        values["stop"] = tuple(stop)
    known = SamplingParams.__dataclass_fields__
    for name in values:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; there are {', '.join(known)}")
    return SamplingParams(**values)


def _many(prompts: Any) -> bool:
    if isinstance(prompts, (str, Chunks)):
        return False
    first = next(iter(prompts), 0)
    return isinstance(first, (str, list, tuple, Chunks)) or hasattr(first, "__len__")
