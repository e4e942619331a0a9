"""What an optimizer of one or several processes keeps and sends; the processes themselves are in test_distributed.py."""

import pytest
import torch
from tiny import make_model, set_gradients

from fastroberta.config import OptimizerConfig
from fastroberta.errors import CheckpointError
from fastroberta.parallel.processes import Processes
from fastroberta.parallel.reduction import OverlappedReduction
from fastroberta.parallel.replicated import ReplicatedOptimizer

ALONE = Processes(torch.device("cpu"))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = make_model()
    optimizer = ReplicatedOptimizer(model, OptimizerConfig(name=name), ALONE)
    optimizer.zero_grad()
    set_gradients(model)
    optimizer.step(grad_scale=torch.tensor(1.0))
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    weights = [parameter.clone() for parameter in model.parameters()]
    next(model.parameters()).grad.view(-1)[3] = float("inf")
    optimizer.step(grad_scale=torch.tensor(1.0))
    assert not torch.isfinite(optimizer.last_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    after = optimizer.tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_state_round_trip_continues_to_the_bit(name):
    first, second = make_model(), make_model()
    options = OptimizerConfig(name=name, learning_rate=0.01)
    one, two = (ReplicatedOptimizer(model, options, ALONE) for model in (first, second))
    set_gradients(first)
    one.step(grad_scale=torch.tensor(1.0))
    saved = {key: value.clone() for key, value in one.tensors().items()}
    for source, target in zip(first.parameters(), second.parameters()):
        target.data.copy_(source.data)
    two.load_tensors(saved, "here")
    for model, optimizer in ((first, one), (second, two)):
        optimizer.zero_grad()
        set_gradients(model, 0.3)
        optimizer.step(grad_scale=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    del saved["exp_avg.lm_head.bias"]
    with pytest.raises(CheckpointError, match=r"here: optimizer state exp_avg.lm_head.bias is missing"):
        two.load_tensors(saved, "here")


class Work:
    def __init__(self, log, index):
        self.log, self.index = log, index

    def wait(self):
        self.log.append(("wait", self.index))


def test_buckets_leave_in_order_as_soon_as_they_and_those_before_are_ready():
    layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(4)))
    unused = torch.nn.Parameter(torch.zeros(1))
    log = []
    # The backward makes gradients in the order 3, 2, 1, 0: bucket 1 must wait for bucket 0.
    buckets = [[layers[2].weight], [layers[3].weight], [layers[1].weight, layers[0].weight], [unused]]

    def send(index):
        assert all(parameter.grad is not None for parameter in buckets[index] if parameter is not unused)
        log.append(("send", index))
        return Work(log, index)

    reduction = OverlappedReduction(buckets, send, lambda: log.append("waiting"))
    layers[0].weight.register_post_accumulate_grad_hook(lambda _: log.append("first layer"))
    layers(torch.ones(2, 3)).sum().backward()
    assert log == ["first layer"]  # outside `run` nothing is sent
    with reduction.run():
        layers(torch.ones(2, 3)).sum().backward()
    sends = [("send", index) for index in range(4)]
    waits = [("wait", index) for index in range(4)]
    assert log[1:] == [*sends[:3], "first layer", sends[3], "waiting", *waits]


def test_a_backward_that_fails_leaves_nothing_behind():
    weight = torch.nn.Parameter(torch.ones(2))
    reduction = OverlappedReduction([[weight]], lambda index: Work([], index), lambda: None)
    with pytest.raises(RuntimeError, match="no more"), reduction.run():
        raise RuntimeError("no more")
    weight.sum().backward()
    with reduction.run():
        weight.sum().backward()


def test_out_of_memory_in_a_backward_sends_what_the_others_wait_for():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    log = []

    def send(index):
        log.append(("send", index))
        return Work(log, index)

    reduction = OverlappedReduction([[weight] for weight in weights], send, lambda: log.append("waiting"))
    with pytest.raises(torch.OutOfMemoryError), reduction.run():
        weights[0].sum().backward()
        raise torch.OutOfMemoryError("no more")
    assert log == [*(("send", index) for index in range(3)), "waiting", *(("wait", index) for index in range(3))]
    weights[0].sum().backward()
    assert len(log) == 7
