"""The run: every system is asked every example in every mode, and every answer is on disk at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow import api
from winnow.bench.lifecycle import modes, peers
from winnow.bench.lifecycle.config import BASELINE, Config, Unit, kind, recipe, units
from winnow.bench.lifecycle.journal import Journal, entries, open_journal
from winnow.bench.lifecycle.record import ExampleRecord, Key
from winnow.bench.lifecycle.report import page
from winnow.bench.lifecycle.summary import summarise
from winnow.bench.lifecycle.system import System, WinnowSystem
from winnow.bench.machine import describe
from winnow.bench.output import save
from winnow.bench.tasks import Example

__all__ = ["State", "Watch", "load", "publish", "run"]


@dataclass(kw_only=True)
class State:
    """Where a run stands.

    Attributes
    ----------
    config : Config
    units : list of Unit
        Everything that is asked of every system.
    records : dict
        Finished examples by key, those of an interrupted run included.
    failures, missing : list of dict, dict
        Examples that a system refused; peers that cannot take part, with the reason.
    now : str
        What is running.
    resumed : int
        How many of the records an earlier run left.
    """

    config: Config
    units: list[Unit]
    records: dict[Key, ExampleRecord] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    now: str = ""
    resumed: int = 0

    @property
    def outstanding(self) -> list[tuple[str, Unit]]:
        """What is still to be asked: a system's name and what."""
        names = (*self.config.systems, *(p for p in self.config.peers if p not in self.missing))
        return [
            (name, unit)
            for unit in self.units
            for name in names
            if (key := _key(name, unit)) not in self.records and key not in self.failures
        ]


#: called whenever something is finished or begun
Watch = Callable[[State], None]


def run(
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    pythons: Mapping[str, str] | None = None,
    llm: api.LLM | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run, or go on with a run, and give its summary.

    Parameters
    ----------
    config : Config
    directory : Path
        Gets the journal, of which nothing is lost when the process dies.
    resume : bool
        Go on with the journal that is there.
    pythons : mapping, optional
        Interpreters of peers, see :func:`winnow.bench.lifecycle.peers.open_peer`.
    llm : LLM, optional
        The model, where it is loaded already.
    watch : callable, optional
        Called with the run's state.

    Raises
    ------
    ValueError
        Unknown names, examples that do not fit the model or their length, a directory that holds
        another run, or a baseline that fails.
    """
    begin = time.monotonic()
    for name in config.peers:
        peers.check(name)
    recipes = {name: recipe(name) for name in config.systems}
    llm = llm if llm is not None else api.load(config.model)
    systems = [WinnowSystem(name, llm, made) for name, made in recipes.items()]
    plan = units(config, lambda text: len(llm.tokens(text)))
    room = _check_lengths(config, plan, llm)
    header = {
        "format": 1,
        "fingerprint": config.fingerprint,
        "config": config.to_dict(),
        "model": llm.model.fingerprint,
        "machine": describe(),
    }
    state = State(config=config, units=plan)
    with open_journal(directory, header, resume=resume) as (journal, earlier):
        _take_up(state, earlier, header)
        asker = _Asker(state, journal, llm, watch or (lambda state: None))
        for unit in plan:
            asker.ask(unit, systems)
        for name in config.peers:
            if all(_key(name, unit) in state.records for unit in plan):
                continue  # done before an interruption
            try:
                with peers.open_peer(name, llm, pythons=pythons or {}, room=room) as peer:
                    journal.write("peer", {"system": name, "about": peer.about})
                    for unit in plan:
                        asker.ask(unit, [peer])
            except peers.MissingPeerError as error:
                state.missing[name] = str(error)
                journal.write("missing", {"system": name, "reason": str(error)})
        journal.write("ended", {"seconds": time.monotonic() - begin})
    return load(directory)


class _Asker:
    """Asks systems one unit, and writes down what comes."""

    def __init__(self, state: State, journal: Journal, llm: api.LLM, watch: Watch) -> None:
        self._state, self._journal, self._llm, self._watch = state, journal, llm, watch

    def ask(self, unit: Unit, systems: list[Any]) -> None:
        state = self._state
        waiting = [s for s in systems if _key(s.name, unit) not in state.records]
        if not waiting:
            return
        example = unit.example(state.config, lambda text: len(self._llm.tokens(text)))
        for record in state.records.values():
            if record.key[1:] == _key("", unit)[1:] and record.checksum != example.checksum:
                raise ValueError("the tasks make other examples than when this run began; give another --out")
        for system in waiting:
            state.now = f"{system.name}, {unit.task}, {unit.length}, {unit.mode}"
            self._watch(state)
            self._hold(system, unit, example)
        self._watch(state)

    def _hold(self, system: System, unit: Unit, example: Example) -> None:
        key = _key(system.name, unit)
        try:
            record = modes.hold(system, unit.mode, example)
        except ValueError as error:
            if system.name == BASELINE:
                raise
            self._state.failures[key] = str(error)
            self._journal.write("failure", {"key": list(key), "error": str(error)})
            return
        self._state.records[key] = record
        self._state.failures.pop(key, None)
        self._journal.write("example", record.to_dict())


def _key(name: str, unit: Unit) -> Key:
    return (name, unit.mode, unit.task, unit.length, unit.number)


def _take_up(state: State, earlier: list[dict[str, Any]], header: Mapping[str, Any]) -> None:
    """What an earlier run left; examples that failed are tried again."""
    for entry in earlier:
        if entry["kind"] == "header" and entry["model"] != header["model"]:
            raise ValueError("the run was begun on other weights; begin a new one with another --out")
        if entry["kind"] == "example":
            record = ExampleRecord.from_dict(entry)
            state.records[record.key] = record
    state.resumed = len(state.records)


def _check_lengths(config: Config, plan: Sequence[Unit], llm: api.LLM) -> int:
    """Room that every example can do with, by the shortest and the longest of each task.

    Raises
    ------
    ValueError
        One does not fit the model, or its task cannot be made that short.
    """
    by_task: dict[str, list[Unit]] = {}
    for unit in plan:
        by_task.setdefault(unit.task, []).append(unit)
    most = 0
    for task, asked in by_task.items():
        shortest, longest = asked[0], asked[-1]
        for unit in (shortest, longest) if longest.length > shortest.length else (shortest,):
            example = unit.example(config, lambda text: len(llm.tokens(text)))
            tokens = len(llm.tokens(example.opening)) + sum(
                len(llm.tokens(example.join.ask(turn.question), special=False))
                + max(turn.max_new_tokens, len(llm.tokens(turn.answers[0], special=False)) + 8)
                for turn in example.turns
            )
            if tokens >= llm.model.max_length:
                raise ValueError(
                    f"{task} at {unit.length} needs {tokens} tokens and {llm.model.name} takes "
                    f"{llm.model.max_length}; choose shorter contexts (--lengths) or fewer --turns"
                )
            most = max(most, tokens)
    return most + most // 10 + 256


def publish(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``lifecycle.json`` and ``lifecycle.html`` into a directory; the files."""
    written = [directory / "lifecycle.json", directory / "lifecycle.html"]
    save(dict(summary), written[0], depth=3)
    written[1].write_text(page(summary), encoding="utf-8")
    return written


def load(directory: Path) -> dict[str, Any]:
    """The summary of what a directory's journal holds, finished or not.

    Raises
    ------
    ValueError
        There is no journal, or it is damaged.
    """
    lines = entries(directory)
    if not lines:
        raise ValueError(f"there is no run in {directory}; make one with winnow bench lifecycle --out")
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    config = Config.from_dict(lines[0]["config"])
    records = {r.key: r for r in map(ExampleRecord.from_dict, by_kind.get("example", []))}
    failures = {tuple(line["key"]): line["error"] for line in by_kind.get("failure", [])}
    about: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for line in lines:  # the last word counts: a peer can come, and go, in a resumed run
        if line["kind"] == "peer":
            about[line["system"]] = line["about"]
            missing.pop(line["system"], None)
        elif line["kind"] == "missing":
            missing[line["system"]] = line["reason"]
    systems: list[dict[str, Any]] = []
    for name in config.systems:
        made = recipe(name)
        systems.append(
            {"name": name, "kind": kind(name, made), "recipe": made.to_yaml(), "missing": None, "about": {}}
        )
    for name in config.peers:
        systems.append(
            {
                "name": name,
                "kind": "peer",
                "recipe": None,
                "missing": missing.get(name),
                "about": about.get(name, {}),
            }
        )
    sessions = [line["machine"] for line in lines if line["kind"] in ("header", "resumed")]
    return summarise(
        config,
        systems,
        sessions,
        sum(line["seconds"] for line in by_kind.get("ended", [])),
        list(records.values()),
        [{"key": list(key), "error": e} for key, e in failures.items() if key not in records],
    )
