"""What can go wrong, and the exit code that each of the programs ends with.

Every message is one line that says what is wrong, where (file and record), and what to do.
"""

from __future__ import annotations


class FastRobertaError(Exception):
    """A fault of the input or of the machine, not of this code; programs print it as one line and exit."""

    exit_code = 1


class ConfigurationError(FastRobertaError):
    """An option, or options that contradict each other."""

    exit_code = 2


class DataError(FastRobertaError):
    """Text, shards or a manifest that cannot be used as they are."""

    exit_code = 3


class NonFiniteError(FastRobertaError):
    """A loss or a gradient that is not finite."""

    exit_code = 4


class DeviceMemoryError(FastRobertaError):
    """A device has too little memory for what was asked."""

    exit_code = 5


class CheckpointError(FastRobertaError):
    """A checkpoint that is missing, damaged or another model's."""

    exit_code = 6


class ProcessError(FastRobertaError):
    """One of several processes has died, hangs, or computes something else than the others."""

    exit_code = 7


class Stopped(FastRobertaError):
    """Stopped by a signal; started again, the program continues where it was."""

    exit_code = 75
