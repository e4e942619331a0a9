"""CUDA graphs without a GPU: a step may be recorded, and what is replayed is what would have run."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from fastroberta_kernels._dispatch import record_launches
from tape import Tape
from tiny import prepare_text
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastroberta.cli.arguments import from_dict
from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.data import Batch
from fastroberta.hf import save_huggingface
from fastroberta.model import RobertaForMaskedLM
from fastroberta.parallel.processes import Processes
from fastroberta.training.graph import EAGER_CALLS, Replayed, choose_graphs, keep_on_device, make_room
from fastroberta.training.trainer import Trainer

MODEL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64,
    "max_position_embeddings": 34,
}  # fmt: skip
FIRST_STEP = 2 + EAGER_CALLS  # in which micro-batches are recorded; counted from 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = [f"{a} gives {b} a {c}. {b} thanks {a}.\n\n" for a in "abcdef" for b in "ghijkl" for c in ("book", "ball")]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines * 4), 290)


def make_trainer(data, output_dir, **changes):
    settings = {
        "data": str(data), "output_dir": str(output_dir), "device": "cpu", "precision": "fp32", "max_seq_length": 32,
        "packing": "contiguous", "train_batch_size": 4, "micro_batch_size": 2, "max_steps": 12,
        "model": MODEL,
        "optimizer": {"learning_rate": 5e-3, "max_grad_norm": 0.5},
        "lr_scheduler": {"warmup_steps": 4},
    } | changes  # fmt: skip
    return Trainer(from_dict(TrainConfig, settings))


def make_pair(data, tmp_path, record, **changes):
    """Two trainers, one that stays eager and one that records."""
    pair = eager, replayed = [make_trainer(data, tmp_path, **changes) for _ in range(2)]
    keep_on_device(eager.optimizer.param_groups, eager.device)
    replayed.replay_steps(record=record)
    for trainer in pair:
        if trainer.scaler.enabled:
            trainer.scaler.scale.fill_(2.0**40)  # overflows, so that the scale changes in every step
    return pair


def run_steps(trainer, first=0, last=FIRST_STEP + 2):
    """Steps `first` to `last`, counted from 0, without the last. Returns all that they leave behind, and their losses."""
    losses = []
    for trainer.step in range(first, last):
        trainer.train_step()
        losses.append(trainer.totals[0] / trainer.totals[2])
    optimizer = trainer.optimizer
    tensors = {**optimizer.weights(), **optimizer.tensors(), **trainer.scaler.state(), "found_inf": trainer.found_inf}
    return {**tensors, "norm": optimizer.last_grad_norm, "losses": torch.stack(losses)}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = load_tokenizer(data)
    model = RobertaForMaskedLM(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **MODEL))
    model.init_weights(7)
    save_huggingface(model, tokenizer, directory)
    return str(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "train_batch_size": 8,
            "batch_ramp": {"start": 4, "tokens": 32 * 16},
            "optimizer": {"learning_rate": 5e-3},
        },  # the expected number of masked tokens changes
        {"precision": "bf16", "attention_scope": "document", "gradient_checkpointing": True},
        {"precision": "fp16", "packing": "doc-sentences"},
        {"precision": "fp8"},
        {"distill_from": "teacher", "model": {**MODEL, "num_hidden_layers": 1}},
    ],
    ids=["ramp", "documents", "padding", "fp8", "teacher"],
)
def test_replayed_steps_are_the_eager_ones(data, teacher, tmp_path, changes, capsys):
    if "distill_from" in changes:
        changes = {**changes, "distill_from": teacher}
    eager, replayed = make_pair(data, tmp_path, Tape.record, **changes)
    assert_same(run_steps(replayed), run_steps(eager))
    assert all(graph.is_recorded for graph in replayed.graphs)
    assert capsys.readouterr().err == "", "a recording failed, or was not the same"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data, tmp_path, capsys):
    """It takes steps eagerly that the other one has replayed. Both evaluate in between."""
    whole, ends, saved_at = make_trainer(data, tmp_path), [], FIRST_STEP + 1
    whole.replay_steps(record=Tape.record)
    run_steps(whole, last=saved_at)
    whole.step = saved_at
    whole.save(SimpleNamespace(meter=SimpleNamespace(pause=contextlib.nullcontext)))
    resumed = make_trainer(data, tmp_path)
    resumed.replay_steps(record=Tape.record)
    assert resumed.step == saved_at
    for trainer in (whole, resumed):
        ends.append((run_steps(trainer, saved_at, saved_at + 2), trainer.score().loss))
        ends[-1] += (run_steps(trainer, saved_at + 2, saved_at + 4),)
        assert all(graph.is_recorded for graph in trainer.graphs)
    assert_same(*ends)
    assert capsys.readouterr().err == ""


def spoil(replay, tensor):
    """A replay after which the last number of a tensor differs in one bit."""

    def run():
        replay()
        bits = tensor.detach().view(-1)[-1:].view(torch.int32)
        bits.bitwise_xor_(1)

    return run


def take_by_value(replay, tensor):
    """A replay that reads what a tensor held when it was recorded."""
    recorded = tensor.clone()

    def run():
        current = tensor.clone()
        tensor.copy_(recorded)
        replay()
        tensor.copy_(current)

    return run


@pytest.fixture(scope="module")
def eager_end(data, tmp_path_factory):
    eager = make_trainer(data, tmp_path_factory.mktemp("eager"))
    keep_on_device(eager.optimizer.param_groups, eager.device)
    return run_steps(eager)


@pytest.mark.parametrize(
    "spoils, names, how",
    [
        (lambda trainer, replay: spoil(replay, trainer.optimizer.gradient), ("updates", "micro-batches"), ""),
        (
            lambda trainer, replay: (
                replay if trainer.graphs[1].has_given_up else spoil(replay, next(trainer.model.parameters()))
            ),
            ("updates",),
            "",
        ),
        (lambda trainer, replay: lambda: None, ("updates", "micro-batches"), ""),
        (lambda trainer, replay: take_by_value(replay, trainer.scaler.scale), ("updates", "micro-batches"), "inf"),
        (lambda trainer, replay: take_by_value(replay, trainer.expected_masked), ("updates", "micro-batches"), "inf"),
        (lambda trainer, replay: take_by_value(replay, trainer.optimizer.param_groups[0]["lr"]), ("updates",), "inf"),
    ],
    ids=["gradient", "weight", "nothing", "scale", "expected", "rate"],
)
def test_a_replay_that_differs_is_not_used(data, tmp_path, spoils, names, how, eager_end, capsys):
    replayed = make_trainer(data, tmp_path)
    replayed.replay_steps(record=lambda work: spoils(replayed, Tape.record(work)))
    assert_same(run_steps(replayed), eager_end)
    steps = {"updates": EAGER_CALLS + 1, "micro-batches": FIRST_STEP}
    starts = [
        f"step {steps[name]}: {name} go on without a CUDA graph: a replay differs from the eager run, in norm by up to {how}"
        for name in names
    ]
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert not any("two eager runs differ" in line for line in lines)


def test_an_eager_run_that_does_not_repeat_is_named():
    total, count, lines = torch.zeros(1), torch.zeros(1), []

    def add():
        count.add_(1)  # not among what is restored
        total.add_(count)

    replayed = Replayed(add, "sums", explain=lines.append, reads=[], writes=lambda: [total], record=Tape.record)
    for _ in range(3):
        replayed()
    (line,) = lines
    assert line.startswith("sums go on without a CUDA graph: a replay differs") and line.endswith(
        "eager runs differ too"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen stream is capturing"), torch.OutOfMemoryError("no memory")]
)
def test_what_cannot_be_recorded_goes_on_with_one_line(data, tmp_path, error, eager_end, capsys):
    def refuse(work):
        Tape.record(work)
        raise error

    refused = make_trainer(data, tmp_path, micro_batch_size="auto")
    refused.batches.size = 2
    refused.replay_steps(record=refuse)
    assert_same(run_steps(refused), eager_end)
    assert all(graph.has_given_up for graph in refused.graphs) and refused.batches.size == 2
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert capsys.readouterr().err.splitlines() == [
        f"step {EAGER_CALLS + 1}: updates go on without a CUDA graph: {reason}",
        f"step {FIRST_STEP}: micro-batches go on without a CUDA graph: {reason}",
    ]

    casts = []
    refused.model.compute_dtype = torch.bfloat16
    refused.forward, forward = (
        lambda batch: casts.append(refused.model.layer[0].casts) or forward(batch),
        refused.forward,
    )
    run_steps(refused, last=1)
    assert len(set(map(id, casts))) == 1 and casts[0] is not None, (
        "a graph casts for itself, an eager step once for all"
    )


class Sums:
    """A function to record, whose calls can run out of memory."""

    def __init__(self):
        self.total, self.lines, self.recordings, self.memory, self.fails_at = torch.zeros(()), [], 0, None, None
        self.calls = 0  # of the function itself
        self.replayed = Replayed(
            self.add, "sums", explain=self.lines.append, reads=[], writes=lambda: [self.total], record=self.record
        )

    def add(self, batch):
        self.calls += 1
        assert self.memory is None or self.memory() is None, "what a graph or its recording held is not yet freed"
        self.total.add_(batch.input_ids.sum())
        if ("call", self.calls) == self.fails_at:
            raise torch.OutOfMemoryError("no memory")

    def record(self, work):
        replay = Tape.record(work)
        self.recordings += 1
        self.memory = weakref.ref(replay.__self__)
        if ("recording", self.recordings) == self.fails_at:
            raise torch.OutOfMemoryError("no memory")
        return replay

    def run(self, size, times):
        ids = torch.full((size, 1), size)
        for _ in range(times):
            before = self.total.clone()
            self.replayed(Batch(ids, ids[:, 0], ids[0, 0], None, None, 0, 0))
            assert self.total == before + size * size


def test_other_shapes_free_the_graph_and_are_recorded_again():
    sums = Sums()
    sums.run(2, 6)
    sums.run(1, 6)
    assert sums.recordings == 2 and sums.calls == 2 * (EAGER_CALLS + 2) and not sums.lines


def test_a_recording_that_runs_out_of_memory_holds_none_when_the_call_is_repeated():
    sums = Sums()
    sums.fails_at = ("recording", 1)
    sums.run(2, 5)
    assert sums.recordings == 1 and sums.lines == ["sums go on without a CUDA graph: OutOfMemoryError: no memory"]
    sums.run(1, 5)  # with fewer sequences it is tried again
    assert sums.recordings == 2 and sums.replayed.is_recorded


def test_memory_that_runs_out_beside_the_copy_costs_the_graph_alone():
    sums = Sums()
    sums.fails_at = ("call", EAGER_CALLS + 1)
    sums.run(2, 5)
    assert sums.recordings == 0 and sums.replayed.has_given_up and len(sums.lines) == 1


def test_an_evaluation_may_have_the_memory_of_graphs():
    sums = Sums()
    sums.run(2, 5)

    def evaluate():
        if sums.memory() is not None:
            raise torch.OutOfMemoryError("no memory")
        return "scores"

    assert make_room(evaluate, [sums.replayed]) == "scores"
    sums.run(2, 5)
    assert sums.recordings == 2 and sums.replayed.is_recorded
    for graphs in ([], [Sums().replayed]):
        with pytest.raises(torch.OutOfMemoryError):
            make_room(evaluate, graphs)


class FromHost(TorchFunctionMode):
    """Refuses tensors made of numbers of the host, and copies from the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function in (torch.tensor, torch.as_tensor, torch.from_numpy) and not isinstance(arguments[0], torch.Tensor):
            raise RuntimeError("a tensor of the host's numbers is copied to the device")
        if isinstance(output, torch.Tensor) and output.device.type == "meta":
            inputs = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
            if any(value.device.type == "cpu" for value in inputs):
                raise RuntimeError(f"{function} copies from the host")
        return output


@pytest.mark.parametrize(
    "changes", [{}, {"attention_scope": "document"}, {"packing": "doc-sentences"}, {"precision": "fp8"}]
)
def test_the_gpus_path_of_a_micro_batch_reads_nothing(data, tmp_path, changes):
    """On meta tensors, which have no values to read: a shape that depended on one would be an error."""
    trainer = make_trainer(data, tmp_path, **({"precision": "bf16"} | changes))
    batch, _ = next(trainer.batches.of_step(0))
    trainer.model.to("meta")
    for name in ("totals", "expected_masked", "mask_seed", "dropout_keys"):
        setattr(trainer, name, getattr(trainer, name).to("meta"))
    trainer.scaler.scale = trainer.scaler.scale.to("meta")
    tensors = {name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    batch = Batch(**{**vars(batch), **tensors})
    with record_launches() as launches:
        trainer.add_gradients(batch)  # special token ids are copied to the device once
        first = len(launches)
        with FromHost():
            trainer.add_gradients(batch)
    assert first > 20 and len(launches) == 2 * first
    with FromHost(), pytest.raises(RuntimeError, match="host's numbers"):
        torch.tensor(1.0, device="meta")


def test_the_tape_refuses_what_a_graph_cannot_hold():
    x = torch.ones(3)
    for work in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0, 2.0]),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
    ):
        with pytest.raises(RuntimeError):
            Tape.record(work)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "bf16", "optimizer": {"name": "lamb", "learning_rate": 5e-3}},
        {"precision": "bf16", "attention_scope": "document", "gradient_checkpointing": True},
        {"precision": "fp16", "packing": "doc-sentences"},
    ],
    ids=["fp32", "lamb", "documents", "padding"],
)
def test_on_a_gpu_replays_are_used_and_change_no_bit(data, tmp_path, changes, capsys):
    eager, replayed = (
        make_trainer(data, tmp_path, device="cuda", cuda_graph=flag, **changes) for flag in (False, True)
    )
    keep_on_device(eager.optimizer.param_groups, eager.device)
    assert_same(run_steps(replayed), run_steps(eager))
    assert all(graph.is_recorded for graph in replayed.graphs) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "device, size, changes, expected",
    [
        ("cpu", 1, {}, (False, "")),
        ("cuda", 1, {}, (True, "")),
        ("cuda", 1, {"torch_compile": True}, (True, "")),
        ("cuda", 1, {"cuda_graph": False}, (False, "")),
        ("cuda", 1, {"dry_run": True}, (False, "")),
        ("cuda", 2, {}, (False, "cuda_graph: not used with several processes or with cpu_offload")),
    ],
)
def test_graphs_are_the_default_of_a_single_gpu(device, size, changes, expected):
    config = from_dict(TrainConfig, {"data": "text", "output_dir": "run", **changes})
    assert choose_graphs(config, Processes(torch.device(device), size=size)) == expected


def test_a_cpu_is_silent(data, tmp_path, capsys):
    make_trainer(data, tmp_path).describe()
    assert "cuda" not in capsys.readouterr().out
