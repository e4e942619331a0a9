"""The trainer as its users run it: learn, stop, resume to the bit, refuse what cannot work."""

import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import prepare_text, type_settings

from fastroberta.cli.arguments import from_dict
from fastroberta.cli.directories import own_directory
from fastroberta.cli.program import SPINS, run
from fastroberta.config import TrainConfig
from fastroberta.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DeviceMemoryError,
    NonFiniteError,
    Stopped,
)
from fastroberta.evaluate import main as evaluate
from fastroberta.train import main
from fastroberta.training.trainer import Trainer

SETTINGS = {
    "precision": "fp32", "max_seq_length": 32, "packing": "contiguous", "train_batch_size": 8, "micro_batch_size": 4,
    "max_steps": 12, "logging_steps": 2, "eval_steps": 6, "eval_sequences": 16, "save_steps": 6,
    "device": "cpu",
    "model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64,
        "max_position_embeddings": 34, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    },
    "optimizer": {"learning_rate": 5e-3},
    "lr_scheduler": {"warmup_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared directory of sentences with something to learn."""
    names = ("anna", "ben", "clara", "david", "emma", "felix")
    lines = [
        f"{a} gives {b} a {thing}. {b} thanks {a} for the {thing}.\n"
        for a in names for b in names if a != b for thing in ("book", "ball", "pear", "coin", "ring")
    ]  # fmt: skip
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines * 3), 300)


def configure(data, output_dir, **changes):
    settings = {**SETTINGS, "data": str(data), "output_dir": str(output_dir), **changes}
    return from_dict(TrainConfig, settings)


def list_arguments(data, output_dir):
    return type_settings({**SETTINGS, "data": data, "output_dir": output_dir})


def read_weights(output_dir, step):
    return {
        name: load_file(output_dir / f"checkpoint-{step:08d}" / f"{name}.safetensors")
        for name in ("model", "optimizer")
    }


def assert_same(ours, theirs):
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        for key in ours[name]:
            assert torch.equal(ours[name][key], theirs[name][key]), key


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that nobody interrupted."""
    output_dir = tmp_path_factory.mktemp("finished")
    Trainer(configure(data, output_dir)).train()
    return output_dir


def test_it_learns_and_writes_metrics(data, tmp_path, capsys):
    Trainer(configure(data, tmp_path, max_steps=60, logging_steps=20, eval_steps=60, save_steps=60)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0] - 1.0
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [20, 40, 60]
    for name in ("train/grad_norm", "train/learning_rate", "throughput/tokens_per_second", "throughput/mfu"):
        assert all(line[name] > 0 for line in logged), name
    shown = capsys.readouterr().out
    assert "before: " in shown and "after: " in shown and "unigram entropy" in shown
    assert f"checkpoint: {tmp_path / 'checkpoint-00000060'}" in shown
    assert shown.count("[") >= 5


@pytest.mark.parametrize("kind, stop_at", [("adamw", 1), ("adamw", 5), ("adamw", 7), ("lamb", 5), ("fp8", 5)])
def test_resumed_run_is_bit_identical(data, finished, tmp_path, kind, stop_at):
    changes = {
        "adamw": {}, "lamb": {"optimizer": {"name": "lamb", "learning_rate": 5e-3}}, "fp8": {"precision": "fp8"},
    }[kind]  # fmt: skip
    if changes:
        finished = tmp_path / "finished"
        Trainer(configure(data, finished, **changes)).train()
    stopped = tmp_path / "stopped"
    trainer = Trainer(configure(data, stopped, **changes))
    step = trainer.train_step

    def step_and_stop(*arguments):
        step(*arguments)
        if trainer.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step = step_and_stop
    with pytest.raises(Stopped, match=f"SIGTERM at step {stop_at}"):
        trainer.train()
    Trainer(configure(data, stopped, **changes)).train()
    assert_same(read_weights(stopped, 12), read_weights(finished, 12))
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(data, finished, tmp_path, capsys):
    def make(name, limit, **changes):
        trainer = Trainer(configure(data, tmp_path / name, **changes))
        forward = trainer.forward

        def forward_or_not(batch):
            if len(batch.input_ids) > limit:
                raise torch.OutOfMemoryError("no more")
            return forward(batch)

        trainer.forward = forward_or_not
        return trainer

    make("halved", 4, micro_batch_size="auto").train()
    assert capsys.readouterr().err.count("out of memory: continuing with 4 sequences at once") == 1
    assert_same(read_weights(tmp_path / "halved", 12), read_weights(finished, 12))
    with pytest.raises(DeviceMemoryError, match="step 1: out of memory with a single sequence; the same command"):
        make("none", 0, micro_batch_size="auto").train()
    with pytest.raises(
        DeviceMemoryError, match=r"step 1: cpu has too little memory for 4 sequences at once; with a lower"
    ):
        make("fixed", 2).train()


def test_micro_batch_changes_nothing_beyond_rounding(data, finished, tmp_path):
    Trainer(configure(data, tmp_path, micro_batch_size=8)).train()
    ours, theirs = (read_weights(path, 12)["model"] for path in (tmp_path, finished))
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "full-sentences"},
        {"packing": "doc-sentences", "attention_scope": "document"},
        {"masking": "static"},
        {"precision": "bf16"},
        pytest.param({"precision": "fp16"}, marks=pytest.mark.slow(reason="10 seconds")),  # slow on a CPU
        {"gradient_checkpointing": True},
        {"optimizer": {"name": "lamb", "decay": "no_bias_norm", "max_grad_norm": 1.0, "learning_rate": 5e-2}},
        {"optimizer": {"name": "adamw", "max_grad_norm": 0.5, "learning_rate": 5e-3}},
    ],
    ids=lambda changes: "-".join(map(str, list(changes.values())[0:1])),
)
def test_every_mode_trains(data, tmp_path, changes):
    Trainer(configure(data, tmp_path, **changes)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3


def test_gradient_checkpointing_changes_no_bit(data, finished, tmp_path):
    Trainer(configure(data, tmp_path, gradient_checkpointing=True)).train()
    assert_same(read_weights(tmp_path, 12), read_weights(finished, 12))


def test_finished_run_says_so(data, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    Trainer(configure(data, finished)).train()
    assert "finished after 12 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_with_other_settings_is_refused(data, finished):
    with pytest.raises(
        ConfigurationError,
        match=r"optimizer.learning_rate: 0.001, but .* was trained with 0.005; keep that value, or give another "
        r"--output_dir and --resume_from .*checkpoint-00000012",
    ):
        Trainer(configure(data, finished, optimizer={"learning_rate": 1e-3}))
    Trainer(configure(data, finished, logging_steps=1, micro_batch_size=2))


def test_damaged_checkpoint_is_refused(data, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    path = copy / "checkpoint-00000012" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: differs from its checksum"):
        Trainer(configure(data, copy))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_one_flipped_bit_in_the_data_is_found_at_the_start(data, tmp_path, split):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    path = copy / f"{split}-00000.bin"
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # of a token, which becomes another one of the vocabulary
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{split}-00000.bin: bytes 0 to \d+ do not match their checksum; copy"):
        Trainer(configure(copy, tmp_path / "run"))


def test_a_batch_of_special_tokens_alone_is_a_step(data, tmp_path):
    trainer = Trainer(configure(data, tmp_path))
    trainer.optimizer.zero_grad()
    trainer.update()
    assert trainer.totals[2] == trainer.found_inf == trainer.optimizer.last_grad_norm == 0


def test_non_finite_gradients_stop_the_run_and_leave_the_weights(data, tmp_path):
    trainer = Trainer(configure(data, tmp_path, eval_sequences=1))
    loss = trainer.loss
    trainer.loss = lambda *arguments: loss(*arguments)._replace(loss=loss(*arguments).loss * float("nan"))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        NonFiniteError,
        match=r"step 1: .* in 2 of steps 1 to 2; .* no checkpoint was saved before .*; try --optimizer.learning_rate below",
    ):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_non_finite_loss_names_its_step_and_the_way_to_go_on(data, tmp_path):
    trainer = Trainer(configure(data, tmp_path / "run", logging_steps=12, save_steps=3, precision="bf16"))
    loss = trainer.loss

    def break_two_steps(*arguments):
        result = loss(*arguments)
        return result._replace(loss=result.loss * float("inf")) if trainer.step in (7, 10) else result

    trainer.loss = break_two_steps
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("step 8: loss or gradient not finite, in 2 of steps 1 to 12; ") and "\n" not in message
    checkpoint = tmp_path / "run" / "checkpoint-00000006"
    assert (tmp_path / "run" / "checkpoint-00000009").is_dir()  # after it
    assert (
        f"the last checkpoint before that step is {checkpoint}; to continue from it, give the same command" in message
    )
    assert message.endswith(
        f"with --resume_from {checkpoint} and another --output_dir, and try --optimizer.learning_rate below 0.005 or "
        "--optimizer.max_grad_norm 1 or --precision fp32"
    )
    # The advice can be followed.
    changes = {"resume_from": str(checkpoint), "precision": "fp32", "optimizer": {"learning_rate": 1e-3}}
    Trainer(configure(data, tmp_path / "next", **changes)).train()


def test_fp16_skips_overflow_and_halves_the_scale(data, tmp_path):
    trainer = Trainer(configure(data, tmp_path, precision="fp16", max_steps=3, eval_sequences=2))
    trainer.scaler.scale.fill_(2.0**120)
    trainer.train()
    assert trainer.scaler.scale < 2.0**120
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_dry_run_leaves_nothing(data, tmp_path, capsys):
    settings = configure(data, tmp_path / "never")
    config = tmp_path / "config.yaml"
    import yaml

    content = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
    content["optimizer"]["betas"] = list(content["optimizer"]["betas"])
    content["model"].pop("vocab_size")
    config.write_text(yaml.safe_dump(content))
    assert main(["--config", str(config), "--dry-run"]) == 0
    assert not (tmp_path / "never").exists()
    shown = capsys.readouterr().out
    assert "parameters" in shown and "memory, total" in shown and "all of them" in shown


def test_dry_run_refuses_what_the_run_would_and_writes_nothing_there(data, tmp_path, capsys):
    there = tmp_path / "there"
    arguments = [*list_arguments(data, there), "--max_steps=2"]
    main(arguments)
    (there / ".partial-00000007-1").mkdir()  # what a killed run, or one that is saving now, has written
    before = {path: path.stat().st_mtime_ns for path in (there, *there.rglob("*"))}
    dry = [*arguments, "--dry-run"]
    assert run(lambda: main(dry)) == 0
    assert f"{there}: continuing after step 2" in capsys.readouterr().out
    assert run(lambda: main([*dry, "--seed=2"])) == 2
    assert f"seed: 2, but {there / 'checkpoint-00000002'} was trained with 1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (there, *there.rglob("*"))} == before
    for place, message in (("file", "is a file"), ("file/below", "cannot be written to")):
        (tmp_path / "file").touch()
        assert run(lambda: main([*list_arguments(data, tmp_path / place), "--dry-run"])) == 2  # noqa: B023
        assert message in capsys.readouterr().err


def test_dry_run_of_the_texts_inside_python_leaves_nothing(tmp_path, monkeypatch):
    def prepare_elsewhere(directory):
        assert tmp_path not in directory.parents
        raise ConfigurationError("far enough")

    monkeypatch.setattr("fastroberta.train.prepare_python_texts", prepare_elsewhere)
    with pytest.raises(ConfigurationError, match="far enough"):
        main(["--output_dir", str(tmp_path / "never"), "--dry-run", "--device", "cpu"])
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full_at_a_metric_is_one_line(data, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "metrics.jsonl").symlink_to("/dev/full")
    trainer = Trainer(configure(data, full))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastroberta.log._drop_lines_after", lambda *_: None)  # would replace the link
        assert run(trainer.train) == 6
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "metrics.jsonl: cannot be written" in message
    assert "No space left" in message and "the same command continues from the last checkpoint" in message


def test_sequence_longer_than_the_position_table_is_refused(data, tmp_path):
    with pytest.raises(ConfigurationError, match="max_position_embeddings"):
        configure(data, tmp_path, max_seq_length=64)


def test_sequence_longer_than_the_initial_models_position_table_is_refused(data, finished, tmp_path):
    """Both numbers, and what to do."""
    start = finished / "checkpoint-00000012"
    config = configure(data, tmp_path, init_from=str(start), max_seq_length=1024)
    with pytest.raises(
        ConfigurationError,
        match=rf"max_seq_length = 1024, but the 34 positions of {start} .* lower max_seq_length to 32",
    ):
        Trainer(config)


@pytest.mark.parametrize("place", ["text.txt", "", "shards/manifest.json", "nowhere"])
def test_text_that_is_not_prepared_is_told_how_to_be(data, tmp_path, capsys, place):
    path = data.parent / place
    assert run(lambda: main(list_arguments(path, tmp_path))) == 3
    what = {"": "has no manifest.json, so it", "nowhere": "no such directory"}.get(place, "is a file, so it")
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: {what}"), message
    assert message.count("\n") == 1
    if place != "nowhere":
        assert f"python -m fastroberta.prepare {path} --out DIR --tokenizer" in message


def test_init_from_a_checkpoint(data, finished, tmp_path):
    start = finished / "checkpoint-00000012"
    trainer = Trainer(configure(data, tmp_path, init_from=str(start)))
    scores = trainer.score()
    assert scores.loss == pytest.approx(json.loads((start / "trainer_state.json").read_text())["eval_loss"], abs=1e-6)


def test_sigterm_from_outside_leads_to_a_checkpoint_and_75(data, tmp_path):
    """The program as a process, stopped by the signal that a scheduler sends."""
    arguments = [*list_arguments(data, tmp_path), "--max_steps=100000", "--logging_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastroberta.train", *arguments], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    message = process.stderr.read()
    assert process.wait(timeout=60) == 75
    assert "SIGTERM at step" in message and "Traceback" not in message
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_a_run_goes_on_when_nobody_reads_what_it_prints(data, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastroberta.train", *list_arguments(data, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--max_steps=4"], stdout=write, stderr=write, env=environment, timeout=120)
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "checkpoint-00000004").is_dir()


def test_two_runs_do_not_share_a_directory(data, tmp_path):
    arguments = [*list_arguments(data, tmp_path / "run"), "--max_steps", "2"]
    with (
        own_directory(tmp_path / "run", ".lock", "--output_dir"),
        pytest.raises(
            ConfigurationError, match=r"another run is writing there \(process \d+ on .*give another --output_dir"
        ),
    ):
        main(arguments)
    assert main(arguments) == 0
    assert main(arguments) == 0  # says that it is finished; the lock went with the run


@pytest.mark.parametrize("place, message", [("file", "is a file"), ("file/below", "cannot be written to")])
def test_a_directory_that_cannot_be_made_is_one_line(data, tmp_path, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=f"--output_dir .* {message}"):
        main(list_arguments(data, tmp_path / place))


def test_sigterm_before_the_first_step_ends_with_75(data, tmp_path):
    code = (
        "import os, signal, sys; os.environ.pop('RANK', None)\n"
        "import fastroberta.cli.program as a\n"
        "sys.exit(a.run(lambda: os.kill(os.getpid(), signal.SIGTERM)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr.startswith("stopped by SIGTERM; nothing is lost"), done


def test_a_checkpoint_is_scored_as_it_was_trained(data, tmp_path, capsys):
    main([*list_arguments(data, tmp_path / "run"), "--max_steps", "4"])
    checkpoint = tmp_path / "run" / "checkpoint-00000004"
    scored = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    evaluate([str(checkpoint), "--data", str(data), "--device", "cpu", "--eval_sequences", "16"])
    scores = json.loads(capsys.readouterr().out)
    assert (scores["max_seq_length"], scores["packing"]) == (32, "contiguous")
    assert scores["eval/loss"] == pytest.approx(scored["eval/loss"], abs=1e-5)
    with pytest.raises(CheckpointError, match=r"the directory of a run, not a checkpoint; give .*checkpoint-00000004"):
        evaluate([str(tmp_path / "run"), "--data", str(data)])
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        evaluate([str(checkpoint), "--data", str(data)])
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        Trainer(configure(data, tmp_path / "next", init_from=str(checkpoint)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory of glibc only")
def test_freed_memory_is_kept():
    """A tensor takes the pages of a larger one before it; by default glibc has given them back."""
    script = """
import resource
import torch
from fastroberta.parallel.processes import keep_freed_memory

def count_new_pages():
    torch.ones(17_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = count_new_pages()
keep_freed_memory()
print(by_default, count_new_pages())
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    by_default, kept = map(int, printed.split())
    assert kept * 10 < by_default


def test_precision_is_chosen_once_and_stays_with_the_run(data, tmp_path, monkeypatch, capsys):
    rates = {torch.float32: 80e9, torch.bfloat16: 0.8e9}
    monkeypatch.setattr("fastroberta.precision.measure_matmul_flops", lambda device, dtype, **_: rates[dtype])
    changes = {"precision": "auto", "save_steps": 6}
    Trainer(configure(data, tmp_path, **changes)).train()
    assert "precision fp32: a core multiplies bf16 at 0.8 GFLOP/s, fp32 at 80.0" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoint-00000012")
    rates[torch.bfloat16] = 200e9  # another machine
    Trainer(configure(data, tmp_path, **changes)).train()
    assert "precision fp32: as in the checkpoint" in capsys.readouterr().out
    state = json.loads((tmp_path / "checkpoint-00000012" / "trainer_state.json").read_text())
    assert state["config"]["precision"] == "fp32"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has GNU OpenMP on Linux only")
@pytest.mark.parametrize(
    "arguments",
    [["train", "--data=.", "--output_dir=run"], ["finetune", "./none", "--train=a.csv", "--dev=a.csv", "--out=out"]],
    ids=lambda arguments: arguments[0],
)
def test_idle_threads_do_not_spin_for_long(tmp_path, arguments):
    """OpenMP prints its settings when it is loaded, which is after ours must have been made."""
    command = [sys.executable, "-m", f"fastroberta.{arguments[0]}", *arguments[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment | {"OMP_DISPLAY_ENV": "verbose"}
    )
    assert "error: " in done.stderr  # there is nothing to train on
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


def test_the_text_is_prepared_before_torch_is_imported_and_its_compiler_never_is(data, tmp_path):
    """Both take seconds of the time to the first step."""
    code = (
        "import shutil, sys\n"
        "from fastroberta import train\n"
        "def prepare(directory):\n"
        "    assert 'torch' not in sys.modules\n"
        f"    shutil.copytree({str(data)!r}, directory)\n"
        "train.prepare_python_texts = prepare\n"
        "assert train.main(sys.argv[1:]) == 0\n"
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    arguments = [one for one in list_arguments(data, tmp_path) if not one.startswith("--data")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--max_steps=2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
