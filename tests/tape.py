"""A tape in place of a CUDA graph, for tests on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

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

    running = None  # the one that records

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

    def launch(self, function, *arguments):
        """Call what PyTorch does not see, such as a kernel of our own, which may write to any of its arguments."""
        with _disable_current_modes():
            self.keep(arguments)
        function(*arguments)
        self.steps.append((function, arguments, {}, None))

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
        tape = cls.running = cls()
        try:
            with tape:
                work()
        finally:
            cls.running = None
            for storage, before in tape.written.values():
                storage.copy_(before)
        return tape.replay
