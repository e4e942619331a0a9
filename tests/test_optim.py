"""Schedules and parameter groups against their definitions; the flat step against PyTorch's own."""

import math

import pytest
import torch

from fastroberta.arguments import from_dict
from fastroberta.config import ModelConfig, OptimizerConfig, TrainConfig
from fastroberta.errors import CheckpointError, ConfigurationError
from fastroberta.model import RobertaForMaskedLM
from fastroberta.optim import (
    LossScaler,
    build_optimizer,
    is_decayed,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)


def make_config(name, power=1.0):
    schedule = {"name": name, "warmup_steps": 10, "power": power if name == "polynomial" else 1.0}
    return from_dict(TrainConfig, {"max_steps": 110, "lr_scheduler": schedule, "optimizer": {"learning_rate": 2.0}})


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine", "constant"])
def test_schedules_at_known_steps(name):
    config = make_config(name, power=0.5)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0) and rates[9] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(2.0)
    halfway = {"linear": 1.0, "polynomial": 2 * math.sqrt(0.5), "cosine": 1.0, "constant": 2.0}
    assert rates[60] == pytest.approx(halfway[name])
    assert rates[109] > 0
    if name != "constant":
        assert rates[109] < 0.25 and rates[10:] == sorted(rates[10:], reverse=True)


def make_model():
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32,
        max_position_embeddings=18,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    model.init_weights(1)
    return model


def test_what_decays():
    names = [name for name, _ in make_model().named_parameters()]
    assert all(is_decayed(name, OptimizerConfig(decay="all")) for name in names)
    spared = {name for name in names if not is_decayed(name, OptimizerConfig(decay="no_bias_norm"))}
    assert spared == {name for name in names if name.endswith("bias") or "norm" in name.lower()}
    assert "embeddings.LayerNorm.weight" in spared and "layer.0.intermediate.weight" not in spared


def set_gradients(model, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adamw_step_is_torchs_with_scale_and_clipping(max_grad_norm):
    ours, theirs = make_model(), make_model()
    options = OptimizerConfig(max_grad_norm=max_grad_norm, decay="no_bias_norm", learning_rate=0.01)
    optimizer = build_optimizer(ours, options)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if is_decayed(n, options)], "weight_decay": 0.01},
        {"params": [p for n, p in theirs.named_parameters() if not is_decayed(n, options)], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        set_gradients(ours, scale=8.0)
        optimizer.step(grad_scale=torch.tensor(8.0))
        set_gradients(theirs)
        norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert (a - b).abs().max() < 1e-6


def test_the_norm_of_many_gradients_is_exact():
    model = torch.nn.Linear(4096, 5000, bias=False)
    optimizer = build_optimizer(model, OptimizerConfig())
    model.weight.grad.fill_(0.1)
    model.weight.grad[0, 0] = 30.0
    optimizer.step(grad_scale=torch.tensor(2.0))
    expected = (0.01 * (4096 * 5000 - 1) + 900) ** 0.5 / 2
    assert optimizer.last_grad_norm.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    optimizer.zero_grad()
    set_gradients(model)
    optimizer.step(grad_scale=torch.tensor(1.0))
    before = {key: value.clone() for key, value in optimizer_tensors(optimizer, model).items()}
    weights = [parameter.clone() for parameter in model.parameters()]
    next(model.parameters()).grad.view(-1)[3] = float("inf")
    optimizer.step(grad_scale=torch.tensor(1.0))
    assert not torch.isfinite(optimizer.last_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    after = optimizer_tensors(optimizer, model)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_state_round_trip_continues_to_the_bit(name):
    first, second = make_model(), make_model()
    options = OptimizerConfig(name=name, learning_rate=0.01)
    one, two = build_optimizer(first, options), build_optimizer(second, options)
    set_gradients(first)
    one.step(grad_scale=torch.tensor(1.0))
    saved = {key: value.clone() for key, value in optimizer_tensors(one, first).items()}
    for source, target in zip(first.parameters(), second.parameters()):
        target.data.copy_(source.data)
    load_optimizer_tensors(two, second, saved, "here")
    for model, optimizer in ((first, one), (second, two)):
        optimizer.zero_grad()
        set_gradients(model, 0.3)
        optimizer.step(grad_scale=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    del saved["exp_avg.lm_head.bias"]
    with pytest.raises(CheckpointError, match=r"here: optimizer state exp_avg.lm_head.bias is missing"):
        load_optimizer_tensors(two, second, saved, "here")


def test_apex_where_it_is_not_installed():
    with pytest.raises(ConfigurationError, match="another project"):
        build_optimizer(make_model(), OptimizerConfig(name="apex_lamb"))


def test_loss_scale_halves_and_grows():
    scaler = LossScaler(torch.device("cpu"), enabled=True)
    start = scaler.scale.item()
    scaler.update(torch.tensor(1.0))
    assert scaler.scale == start / 2
    for _ in range(scaler.GROWTH_INTERVAL):
        scaler.update(torch.tensor(0.0))
    assert scaler.scale == start
    off = LossScaler(torch.device("cpu"), enabled=False)
    off.update(torch.tensor(1.0))
    assert off.scale == 1.0
