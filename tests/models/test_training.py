"""The loop of every training: what it saves is what it goes on with, and it stops where it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from winnow.models.training import Loss, Training, has_checkpoint


class Line(Training):
    """Fits a line to points that follow from the step's number; ``weight`` learns, ``bias`` does not."""

    def __init__(self, directory: Path, *, steps: int = 8, form: str = "line", fails_at: int = -1) -> None:
        module = nn.Linear(3, 1)
        with torch.no_grad():
            module.weight.fill_(0.5)
            module.bias.fill_(0.25)
        self.module, self.fails_at, self.infinite = module, fails_at, False
        super().__init__(
            directory, module, [module.weight], form=form, steps=steps, betas=(0.9, 0.99), clip=1.0
        )

    def rate(self, step: int) -> float:
        return 0.1 / (step + 1)

    def loss(self, step: int) -> Loss:
        if step == self.fails_at:
            raise KeyboardInterrupt
        points = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        error = self.module(points).square().mean()
        value = error * float("inf") if self.infinite else error
        return Loss(value=value, tokens=4, log={"error": float(error.detach())})


def log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_it_learns_what_it_is_told_and_logs_every_step(tmp_path: Path, capsys) -> None:
    run = Line(tmp_path)
    run.train()
    assert (run.module.weight != 0.5).all()
    assert (run.module.bias == 0.25).all()
    records = log(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["rate"] for record in records] == [0.1 / step for step in range(1, 9)]
    assert records[-1]["error"] < records[0]["error"]
    assert "step 8  error " in capsys.readouterr().out


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole = Line(tmp_path / "whole")
    whole.train()
    killed = Line(tmp_path / "killed", fails_at=5)
    with pytest.raises(KeyboardInterrupt):
        killed.train(save_every=0.0)
    resumed = Line(tmp_path / "killed")
    assert resumed.step == 5
    resumed.train()
    assert torch.equal(resumed.module.weight, whole.module.weight)
    errors = [[record["error"] for record in log(tmp_path / name)] for name in ("whole", "killed")]
    assert errors[0] == errors[1]


def test_steps_behind_the_last_checkpoint_are_made_again(tmp_path: Path) -> None:
    whole = Line(tmp_path / "whole")
    whole.train()
    killed = Line(tmp_path / "killed", fails_at=5)
    killed.train(until=3)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = Line(tmp_path / "killed")
    assert resumed.step == 3
    resumed.train()
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert [record["step"] for record in log(tmp_path / "killed")] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]


def test_a_torn_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    run = Line(tmp_path)
    run.train(until=2)

    def torn(state, file):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        run.train(until=4)
    monkeypatch.undo()
    assert Line(tmp_path).step == 2


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    run = Line(tmp_path)
    run.train(until=2)
    before, run.infinite = run.module.weight.detach().clone(), True
    with pytest.raises(ValueError, match="step 2 has no finite gradient"):
        run.train()
    assert torch.equal(run.module.weight, before)
    assert Line(tmp_path).step == 2


def test_another_training_is_refused(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    Line(tmp_path).save()
    assert has_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="another training"):
        Line(tmp_path, form="curve")
