"""The benchmark of attached methods, on a tiny model."""

from __future__ import annotations

import pytest

from winnow.bench import attached
from winnow.kernels import backend

pytestmark = pytest.mark.skipif(not backend.isas(), reason="the extension was not built")


def test_rounds_are_told_apart_by_what_was_held() -> None:
    names = ["h2o", "lazy-eviction", "razor-attention", "epicache"]
    report = attached.run(contenders=names, entries=1500, prompt=32, rounds=2, preset="tiny")
    rows = report["rows"]
    assert set(rows) == {"full", *names}
    assert rows["full"]["uncut"]["over_full"] == 1.0
    assert rows["full"]["cut"] is None
    assert rows["h2o"]["uncut"] is None  # it acted at the end of the prompt
    assert rows["h2o"]["cut"]["seconds"] > 0
    held = [one["entries"] for one in rows["lazy-eviction"]["samples"]]
    assert held[0] >= 1500 * 4 * 2 > held[1]  # layers and heads; cut in its first round
    assert rows["h2o"]["bytes_stored"] < rows["full"]["bytes_stored"]
    assert report["limit"]["bytes"] == 2 * 4 * 2 * 1500 * 16 * 2
    assert rows["epicache"]["bytes_stored"] < rows["full"]["bytes_stored"]  # it read a profile of this model
    assert "profile: layer-sensitivity.safetensors" in report["config"]["recipes"]["epicache"]
    assert attached.table(report).row_count == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"contenders": ["h20"]}, "unknown contender"), ({"entries": 10, "prompt": 10}, "does not fit")],
)
def test_refuses(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached.run(preset="tiny", **wrong)  # type: ignore[arg-type]
