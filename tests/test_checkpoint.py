"""A checkpoint is whole or not there, and a damaged one is noticed."""

import json
import os

import pytest
import torch

from fastroberta.checkpoint import (
    list_checkpoints,
    load_optimizer_tensors,
    read_state,
    remove_old_checkpoints,
    remove_partial_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from fastroberta.errors import CheckpointError


def save(directory, step=1, eval_loss=None):
    def write_model(path):
        (path / "config.json").write_text("{}")

    tensors = {"exp_avg.a": torch.arange(6.0).view(2, 3), "step.a": torch.tensor(3.0)}
    return save_checkpoint(directory, step, write_model, tensors, {"step": step, "eval_loss": eval_loss, "config": {}})


def test_round_trip(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "checkpoint-00000012"
    verify_checkpoint(path)
    assert read_state(path)["step"] == 12
    tensors = load_optimizer_tensors(path)
    assert torch.equal(tensors["exp_avg.a"], torch.arange(6.0).view(2, 3)) and tensors["step.a"] == 3


def test_files_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        name: "0o640" for name in ("config.json", "manifest.json", "optimizer.safetensors", "trainer_state.json")
    }


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path)
    for name in ("config.json", "optimizer.safetensors", "trainer_state.json"):
        file = path / name
        original = file.read_bytes()
        for place in range(0, len(original), max(1, len(original) // 7)):
            damaged = bytearray(original)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(path)
        file.write_bytes(original)
    verify_checkpoint(path)


def test_missing_file_and_manifest_are_named(tmp_path):
    path = save(tmp_path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing; move checkpoint-00000001 away"):
        verify_checkpoint(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be read"):
        verify_checkpoint(path)


def test_newest_and_best_are_kept(tmp_path):
    for step, loss in ((1, float("nan")), (2, 3.0), (3, 1.0), (4, 2.0), (5, None), (6, 2.5)):
        save(tmp_path, step, loss)
    remove_old_checkpoints(tmp_path, keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "5", "6"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", "\xff"])
def test_an_old_checkpoint_without_a_readable_state_stays_and_stops_nothing(tmp_path, content):
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 2.5)):
        save(tmp_path, step, loss)
    state = tmp_path / "checkpoint-00000001" / "trainer_state.json"
    state.unlink()
    if content is not None:
        state.write_text(content, encoding="latin-1")
    remove_old_checkpoints(tmp_path, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "3", "4"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1)

    def fail(path):
        (path / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"checkpoint-00000002: cannot be written .*No space left"):
        save_checkpoint(tmp_path, 2, fail, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_a_step_is_replaced_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def die(path, **_):
        if path.exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("shutil.rmtree", die)
        save(tmp_path, 1, eval_loss=2.0)
    (path,) = list_checkpoints(tmp_path)
    verify_checkpoint(path)
    assert read_state(path)["eval_loss"] == 2.0
    remove_partial_checkpoints(tmp_path)
    assert not any(path.name.startswith(".partial") for path in tmp_path.iterdir())


def test_half_written_directories_are_no_checkpoints_and_go(tmp_path):
    partial = tmp_path / ".partial-00000007-1"
    partial.mkdir()
    (partial / "manifest.json").write_text(json.dumps({"files": {}}))
    save(tmp_path, 1)
    assert len(list_checkpoints(tmp_path)) == 1
    remove_partial_checkpoints(tmp_path)
    assert not partial.exists()
