"""Schedules and parameter groups against their definitions; the flat step against PyTorch's own."""

import math

import pytest
import torch
from tiny import make_model, set_gradients

from fastroberta.cli.arguments import from_dict
from fastroberta.config import OptimizerConfig, TrainConfig
from fastroberta.errors import ConfigurationError
from fastroberta.optim import BatchSchedule, LossScaler, build_optimizer, is_decayed, learning_rate, settle_epochs


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


def test_what_decays():
    names = [name for name, _ in make_model().named_parameters()]
    assert all(is_decayed(name, OptimizerConfig(decay="all")) for name in names)
    spared = {name for name in names if not is_decayed(name, OptimizerConfig(decay="no_bias_norm"))}
    assert spared == {name for name in names if name.endswith("bias") or "norm" in name.lower()}
    assert "embeddings.LayerNorm.weight" in spared and "layer.0.intermediate.weight" not in spared


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adamw_step_is_torchs_with_scale_and_clipping(max_grad_norm):
    ours, theirs = make_model(), make_model()
    options = OptimizerConfig(max_grad_norm=max_grad_norm, decay="no_bias_norm", learning_rate=0.01)
    optimizer = build_optimizer(dict(ours.named_parameters()), options)
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
    optimizer = build_optimizer(dict(model.named_parameters()), OptimizerConfig())
    model.weight.grad.fill_(0.1)
    model.weight.grad[0, 0] = 30.0
    optimizer.step(grad_scale=torch.tensor(2.0))
    expected = (0.01 * (4096 * 5000 - 1) + 900) ** 0.5 / 2
    assert optimizer.last_grad_norm.item() == pytest.approx(expected, rel=1e-5)


def test_batches_without_a_ramp():
    schedule = BatchSchedule(from_dict(TrainConfig, {"train_batch_size": 96}))
    assert [schedule.samples(step) for step in (0, 1, 7)] == [range(96), range(96, 192), range(672, 768)]


@pytest.mark.parametrize("tokens", [1, 1000, 40_960, 1_000_000])
def test_batch_ramp_grows_with_the_tokens_seen(tokens):
    settings = {"train_batch_size": 64, "max_seq_length": 128, "batch_ramp": {"start": 16, "tokens": tokens}}
    schedule = BatchSchedule(from_dict(TrainConfig, settings))
    end, sizes = 0, []
    for step in range(1000):
        samples = schedule.samples(step)
        assert samples.start == end  # every sample once, in order
        end = samples.stop
        # k x 16, where k grows linearly from 1 to 4 with the tokens seen before the step.
        expected = 16 * min(4, 1 + math.floor(3 * samples.start * 128 / tokens))
        assert len(samples) == expected or (tokens == 1 and step == 0)
        sizes.append(len(samples))
    assert sizes[0] == 16 and sizes[-1] == 64


@pytest.mark.parametrize("ramp", [{}, {"start": 8, "tokens": 2000}])
@pytest.mark.parametrize("epochs", [0.01, 1, 2.5])
def test_epochs_are_the_steps_that_see_every_sequence(epochs, ramp):
    settings = {
        "train_batch_size": 32, "max_seq_length": 16, "num_train_epochs": epochs, "batch_ramp": ramp,
        "lr_scheduler": {"warmup_ratio": 0.25},
    }  # fmt: skip
    config = from_dict(TrainConfig, settings)
    assert settle_epochs(config, 1001).startswith(f"num_train_epochs = {epochs}: ")
    schedule = BatchSchedule(config)
    assert schedule.samples(config.max_steps).start >= epochs * 1001 > schedule.samples(config.max_steps - 1).start
    assert config.lr_scheduler.warmup_steps == round(config.max_steps / 4)
    assert settle_epochs(config, 1001) == ""


def test_half_a_ramp_is_refused():
    for half in ({"start": 16}, {"tokens": 1000}):
        with pytest.raises(ConfigurationError, match="belong together"):
            from_dict(TrainConfig, {"train_batch_size": 64, "batch_ramp": half})
    with pytest.raises(ConfigurationError, match=r"batch_ramp.start = 24 must divide train_batch_size = 64"):
        from_dict(TrainConfig, {"train_batch_size": 64, "batch_ramp": {"start": 24, "tokens": 1}})


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
