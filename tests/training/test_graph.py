"""CUDA graphs without a GPU: a step may be recorded, and what is replayed is what would have run."""

from __future__ import annotations

import pytest
import torch
from fastroberta_kernels._dispatch import record_launches
from tiny import prepare_text
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastroberta.cli.arguments import from_dict
from fastroberta.config import TrainConfig
from fastroberta.data import Batch
from fastroberta.training.graph import EAGER_CALLS, Replayed, keep_on_device
from fastroberta.training.trainer import Trainer

aten = torch.ops.aten
HOST_READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
DYNAMIC_SHAPES = {
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.repeat_interleave,
    aten.bincount,
}
FROM_HOST = {aten.lift_fresh}  # torch.tensor(numbers)


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: records operations with their arguments as they are, and leaves no effect behind.

    `replay` repeats them in the same memory, so a number that Python computed anew in every step would stay what it was.
    Like a capture, it refuses reads by the host, copies from the host, and shapes that depend on data.
    """

    def __init__(self):
        super().__init__()
        self.steps = []
        self.written = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        packet = function.overloadpacket
        if packet in HOST_READS | DYNAMIC_SHAPES | FROM_HOST:
            raise RuntimeError(f"{function} is not permitted while a graph is recorded")
        if packet in (aten.index, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        ):
            raise RuntimeError("a boolean index makes a shape that depends on data")
        for parameter, value in zip(function._schema.arguments, arguments):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.keep(value)
        self.keep(options.get("out"))
        output = function(*arguments, **options)
        self.steps.append((function, arguments, options, output))
        return output

    def keep(self, value):
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in self.written:
                self.written[storage_of(tensor)] = (tensor.untyped_storage(), tensor.untyped_storage().clone())

    def replay(self):
        with torch.no_grad():
            for function, arguments, options, output in self.steps:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(output), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and storage_of(old) != storage_of(new):  # no view
                        old.copy_(new)

    @classmethod
    def record(cls, work):
        with cls() as tape:
            work()
        for storage, before in tape.written.values():
            storage.copy_(before)
        return tape.replay


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = [f"{a} gives {b} a {c}. {b} thanks {a}.\n\n" for a in "abcdef" for b in "ghijkl" for c in ("book", "ball")]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines * 4), 290)


def make_trainer(data, output_dir, **changes):
    settings = {
        "data": str(data), "output_dir": str(output_dir), "device": "cpu", "precision": "fp32", "max_seq_length": 32,
        "packing": "contiguous", "train_batch_size": 8, "micro_batch_size": 2, "max_steps": 12,
        "model": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64,
            "max_position_embeddings": 34,
        },
        "optimizer": {"learning_rate": 5e-3, "max_grad_norm": 0.5},
        "lr_scheduler": {"warmup_steps": 4},
    } | changes  # fmt: skip
    return Trainer(from_dict(TrainConfig, settings))


def run_steps(trainer, count=EAGER_CALLS + 3):
    """The loss of each step."""
    losses = []
    for trainer.step in range(count):
        trainer.train_step()
        losses.append(trainer.totals[0].item() / trainer.totals[2].item())
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {
            "batch_ramp": {"start": 4, "tokens": 32 * 16},
            "optimizer": {"learning_rate": 5e-3},
        },  # the expected number of masked tokens changes
        {"precision": "bf16", "attention_scope": "document", "gradient_checkpointing": True},
        {"precision": "fp16", "packing": "doc-sentences"},
        {"precision": "fp8"},
    ],
    ids=["ramp", "documents", "padding", "fp8"],
)
def test_replayed_steps_are_the_eager_ones(data, tmp_path, changes, capsys):
    eager, replayed = (make_trainer(data, tmp_path, **changes) for _ in range(2))
    keep_on_device(eager.optimizer.param_groups, eager.device)
    replayed.replay_steps(record=Tape.record)
    for trainer in (eager, replayed):
        if trainer.scaler.enabled:
            trainer.scaler.scale.fill_(2.0**40)  # overflows, so that the scale changes in every step
    assert run_steps(replayed) == run_steps(eager)
    for ours, theirs in zip(replayed.model.parameters(), eager.model.parameters()):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        (replayed.optimizer.last_grad_norm, replayed.scaler.scale), (eager.optimizer.last_grad_norm, eager.scaler.scale),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip
    assert capsys.readouterr().err == "", "a recording failed"


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


def test_what_cannot_be_recorded_goes_on_with_one_line(data, tmp_path, capsys):
    def refuse(work):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    eager, refused = (make_trainer(data, tmp_path) for _ in range(2))
    keep_on_device(eager.optimizer.param_groups, eager.device)
    refused.replay_steps(record=refuse)
    assert run_steps(refused) == run_steps(eager)
    assert capsys.readouterr().err.splitlines() == [
        "step 1: micro-batches go on without a CUDA graph: RuntimeError: operation not permitted",
        f"step {EAGER_CALLS + 1}: updates go on without a CUDA graph: RuntimeError: operation not permitted",
    ]


def test_other_shapes_are_recorded_again():
    sums, recordings = torch.zeros(()), []

    def record(work):
        recordings.append(work)
        return Tape.record(work)

    def add(batch):
        sums.add_(batch.input_ids.sum())

    replayed, expected = Replayed(add, pytest.fail, record), 0
    for size in [2] * 6 + [1] * 6:
        expected += size * size
        ids = torch.full((size, 1), size)
        replayed(Batch(ids, ids[:, 0], ids[0, 0], None, None, 0, 0))
        assert sums == expected
    assert len(recordings) == 2


def test_a_cpu_says_that_it_has_no_graphs(data, tmp_path, capsys):
    make_trainer(data, tmp_path, cuda_graph=True).describe()
    assert "cuda_graph: not used, since it needs a GPU and a single process" in capsys.readouterr().out
