"""A session: one sequence that outlives a request, for several turns over one context."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from winnow.engine.engine import Engine, Event, Progress
from winnow.engine.repair import Division
from winnow.engine.request import Result, SamplingParams
from winnow.engine.sequence import Holder, Sequence, rotary_of
from winnow.store import files

__all__ = ["Session"]


class Session:
    """Turns over one context; each turn computes only what is new.

    Made by ``LLM.session()``. Close it, or use it in a ``with`` block, to free its entries.

    Parameters
    ----------
    engine : Engine
    sequence : Sequence or None
        None starts an empty one.
    """

    def __init__(self, engine: Engine, sequence: Sequence | None = None) -> None:
        self._engine = engine
        self._sequence = sequence if sequence is not None else engine.new_sequence()
        self._open = True

    # ------------------------------------------------------------------ turns

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: prompts and answers."""
        return list(self._sequence.tokens)

    def run(
        self,
        tokens: Seq[int],
        params: SamplingParams,
        progress: Progress | None = None,
        *,
        division: Division | None = None,
    ) -> Result:
        """Append ``tokens``, generate, and return the result; see :meth:`Engine.submit`."""
        for event in self.stream(tokens, params, progress, division=division):
            result = event.result
        return result

    def stream(
        self,
        tokens: Seq[int],
        params: SamplingParams,
        progress: Progress | None = None,
        *,
        division: Division | None = None,
    ) -> Iterator[Event]:
        """As :meth:`run`, token by token. A turn that is broken off is rolled back whole."""
        self._check_open()
        self._engine.submit(tokens, params, sequence=self._sequence, division=division)
        return self._engine.events(progress)

    def read(self, tokens: Seq[int], *, probe: Seq[int] = ()) -> Result:
        """Append ``tokens`` without an answer; the result has their figures.

        Parameters
        ----------
        tokens : sequence of int
        probe : sequence of int
            Text for a compression that reads one over the entries before it acts (EpiCache).
        """
        self._sequence.probe = list(probe)
        result = self.run(tokens, SamplingParams(max_new_tokens=1, ignore_eos=True))
        self.rewind(len(self._sequence.tokens) - 1)
        return result

    def fork(self) -> Session:
        """A new session that starts from a snapshot of this one and shares its entries.

        Asking each question of a list in its own fork reads the context once and lets no
        question see another. Close the forks before this session goes on.
        """
        self._check_open()
        child = self._engine.new_sequence()
        child.share(Holder(lambda: None), self._sequence)
        return Session(self._engine, child)

    def rewind(self, tokens: int) -> None:
        """Forget everything after the first ``tokens`` tokens.

        Raises
        ------
        ValueError
            If a compression acted on more than those: what it dropped cannot come back.
        """
        self._check_open()
        sequence = self._sequence
        if not 0 <= tokens <= len(sequence.tokens):
            raise ValueError(f"this session has {len(sequence.tokens)} tokens, it cannot rewind to {tokens}")
        if tokens < sequence.compressed:
            raise ValueError(
                f"entries were compressed at {sequence.compressed} tokens, so the first {tokens} are not "
                "whole any more; start a new session"
            )
        sequence.rollback(tokens, min(tokens, sequence.store.length), sequence.turns)

    def bytes_stored(self) -> dict[str, int]:
        """Measured KV bytes held now, by ``tier/codec``."""
        return self._sequence.bytes_stored()

    def head_entries(self) -> list[list[int]]:
        """Entries by layer and KV head, borrowed ones included."""
        store = self._sequence.store
        return [store.lengths(layer) for layer in range(store.layers)]

    def head_bytes(self) -> list[list[int]]:
        """Bytes of the entries by layer and KV head, borrowed ones included, without page rounding."""
        store = self._sequence.store
        return [
            [
                sum(int(segment.lengths[head]) * segment.bytes_per_entry for segment in segments)
                for head in range(store.shape.heads)
            ]
            for segments in map(store.segments, range(store.layers))
        ]

    # ------------------------------------------------------------------ disk

    def save(self, path: str | Path) -> None:
        """Write tokens and entries to ``path``, atomically and with checksums.

        Raises
        ------
        winnow.store.files.StoreFileError
            No space or no permission; a file that was there before is untouched.
        """
        self._check_open()
        sequence = self._sequence
        header: dict[str, Any] = {
            "model_name": self._engine.model.name,
            "model": self._engine.model.fingerprint,
            "recipe": self._engine.recipe.fingerprint(),
            "recipe_yaml": self._engine.recipe.to_yaml(),
            "tokens": sequence.tokens,
            "turns": sequence.turns,
            "pure": sequence.pure,
            "compressed": sequence.compressed,
        }
        if sequence.compression is not None:
            header["compression"] = sequence.compression.memory()
        files.save(sequence.store, Path(path), header)

    @classmethod
    def load(cls, engine: Engine, path: str | Path) -> Session:
        """Open what :meth:`save` wrote, for the same model and recipe.

        Raises
        ------
        winnow.store.files.StoreFileError
            Torn, foreign, or of another model or recipe.
        """
        expect = {"model": engine.model.fingerprint, "recipe": engine.recipe.fingerprint()}
        store, header = files.load(Path(path), expect, rotary=rotary_of(engine.model))
        sequence = Sequence(engine.recipe, store, engine.profile)
        sequence.tokens = list(header["tokens"])
        sequence.turns, sequence.pure = int(header["turns"]), int(header["pure"])
        sequence.compressed = int(header["compressed"])
        if sequence.compression is not None:
            cls._recall(sequence, header, path)
        return cls(engine, sequence)

    @staticmethod
    def _recall(sequence: Sequence, header: dict[str, Any], path: str | Path) -> None:
        assert sequence.compression is not None
        try:
            if "compression" in header:
                sequence.compression.recall(header["compression"])
            elif sequence.compression.remembers:
                raise KeyError("compression")
        except (KeyError, TypeError, ValueError) as error:
            sequence.close()
            raise files.StoreFileError(
                f"{path} was saved by another version, which did not keep what its compression remembers as "
                f"this one does ({error}); read its tokens anew and save the session again"
            ) from error

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Free the entries; may be called again."""
        self._open = False
        self._sequence.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("this session is closed; open a new one with llm.session()")
