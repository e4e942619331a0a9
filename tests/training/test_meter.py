"""What a logging interval adds up to."""

import pytest
import torch

from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.optim import LossScaler
from fastroberta.parallel.processes import Processes
from fastroberta.training.meter import Meter


def test_throughput_leaves_out_the_first_step_unless_it_is_alone(clock):
    device, one = torch.device("cpu"), torch.ones(())
    config = TrainConfig(precision="fp32", model=ModelConfig(vocab_size=300))

    def measure(*steps):
        """Tokens/s of a fresh meter's intervals; each is a list of the seconds of steps of 100 tokens."""
        meter, step = Meter(config, Processes(device), torch.float32, LossScaler(device, enabled=False)), 0
        for interval in steps:
            for seconds in interval:
                clock.now += seconds
                meter.add(torch.ones(3, dtype=torch.float64), one, 0 * one, [(100, 100 * 100)])
                step += 1
            with meter.pause():
                clock.now += 1000
            yield meter.read(step)["throughput/tokens_per_second"]

    assert list(measure([50, 1, 1], [2, 2])) == pytest.approx([100, 50])
    assert list(measure([50], [2])) == pytest.approx([2, 50])
