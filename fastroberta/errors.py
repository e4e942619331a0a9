"""The expected failures, and the exit code for each.

Every message is one line that says what is wrong, where (file and record), and what to do.
"""

from __future__ import annotations


class FastRobertaError(Exception):
    """A problem with the input or the machine, not a bug; programs print it as one line and exit."""

    exit_code = 1


class ConfigurationError(FastRobertaError):
    """A wrong setting, or settings that contradict each other."""

    exit_code = 2


class DataError(FastRobertaError):
    """Text, shards or a manifest that cannot be used."""

    exit_code = 3


class NonFiniteError(FastRobertaError):
    """A loss or a gradient that is not finite."""

    exit_code = 4


class DeviceMemoryError(FastRobertaError):
    """Out of memory on a device."""

    exit_code = 5


class CheckpointError(FastRobertaError):
    """A checkpoint that is missing, damaged, or of another model."""

    exit_code = 6


class ProcessError(FastRobertaError):
    """One of several processes died, hangs, or computes something different from the others."""

    exit_code = 7


class Stopped(FastRobertaError):
    """Stopped by a signal; run again, the program continues where it stopped."""

    exit_code = 75
