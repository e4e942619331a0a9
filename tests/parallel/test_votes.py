"""All processes must leave the loop after the same step, whichever of them got the signal."""

import torch

from fastroberta.parallel.processes import Processes
from fastroberta.parallel.votes import StopVotes


def test_a_single_process_stops_at_once():
    asked = []
    votes = StopVotes(Processes(torch.device("cpu")), lambda: bool(asked))
    votes.cast(torch.tensor(0.0))
    assert not votes.agreed()
    asked.append("SIGTERM")
    assert votes.agreed()


def test_several_processes_go_by_the_sum_and_not_by_their_own_signal():
    votes = StopVotes(Processes(torch.device("cpu"), 0, 2), lambda: True)
    assert not votes.agreed()  # no step has been reduced
    votes.cast(torch.tensor(0.0))
    assert not votes.agreed()  # its signal came after the reduction: the others do not know of it
    votes.cast(torch.tensor(1.0))
    assert votes.agreed()
