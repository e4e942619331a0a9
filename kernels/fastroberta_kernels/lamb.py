"""FusedLAMB: layer-wise adaptive moments over flat buffers, for any model's parameters.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962),
algorithm 2, with the options of NVIDIA apex's FusedLAMB, which this class replaces.

One step, for gradients g_i of parameters p_i (i: one tensor), with loss scale s:

    n   = |g| / s over all tensors of all groups;  if not finite, the step ends here and `num_skipped` grows
    c   = n / max_grad_norm if 0 < max_grad_norm < n else 1
    g'  = g / (s c)   [+ wd p: adam_w_mode=False]
    m   = b1 m + b3 g'           b3 = 1 - b1 (grad_averaging) or 1
    v   = b2 v + (1 - b2) g'^2
    u   = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)   [+ wd p: adam_w_mode=True]
          (bias_correction=False: without the two divisions; t: the tensor's own steps)
    r   = |p| / |u| if (wd != 0 or use_nvlamb) and both norms are not 0 else 1
    p   = p - lr r u;  a bf16 or fp16 parameter is p rounded, p itself its fp32 master

Flat buffers. The optimizer owns one buffer each for masters, gradients and both moments (fp32), and one for 16-bit
parameters. Every parameter is a segment of them that starts at a multiple of 64 elements. Parameters become views:
`p.data` is re-pointed once, at construction (fp32 parameters into the masters, 16-bit ones into the 16-bit buffer).
Memory: 16 bytes per parameter including the parameter itself, 18 for 16-bit ones.

Gradients. `zero_grad()` zeroes the gradient buffer and makes views of it `p.grad`; autograd then accumulates in place and
nothing is copied. That holds for all parameters with fp32 gradients: fp32 parameters, and 16-bit ones with
`p.grad_dtype = torch.float32`, which then accumulate in fp32. The step copies any other gradient into the buffer
(`torch._foreach_copy_`). Gradients are read, never written.

Bytes moved on CUDA (csrc/fused_lamb.cu): 44 per parameter including the gradient norm, 46 if a 16-bit copy is written.
apex moves 52 and stores u in place of the gradient. Norms are summed in two stages in a fixed order, so every step
repeats bit for bit. No random numbers.

Shards (ZeRO-1, FSDP2). With `all_reduce`, every process owns a piece of each tensor and updates only that; parameters
have the same order and groups in all processes. |g|, |p| and |u| remain norms of whole tensors: sums of squares are added
over processes in fp64, in two calls per step, one with a single number and one with two numbers per tensor.

Compared with apex's FusedLAMB, for the same arguments and the same mathematics:
    - gradients may be bf16 and stay intact; u is never rounded to their dtype
    - fp32 masters are part of `state_dict()`, which has torch's usual format
    - a step with a non-finite norm is skipped before anything (moments, step counts) is written, without asking the GPU
    - `max_grad_norm=0` or None disables clipping; in apex it sets every update to zero
    - groups may be added later; bias_correction, adam_w_mode, grad_averaging and use_nvlamb may differ between groups
    - sizes are 64-bit; step counts and learning rate live on the device, so a CUDA graph can hold the step
    - parameters without a gradient are skipped as in torch.optim: moments and step count stay, and nothing decays
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import _cuda

SOURCE = "fused_lamb.cu"
KERNELS = ("lamb_square_gradients", "lamb_prepare", "lamb_moments", "lamb_norms", "lamb_apply")
ALIGNMENT = 64  # elements: segments start at a cache line in 16-bit and 32-bit buffers
CHUNK = 8192  # elements that one CUDA block works on
CPU_CHUNK = 65536  # elements that a CPU thread takes at a time in PyTorch: its slices stay in the core's cache
LOW_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernels number the 16-bit copies
GROUP_FIELDS = 9  # struct Group, in doubles
STEP_FIELDS = 10  # struct Step, in floats


class FusedLAMB(torch.optim.Optimizer):
    """LAMB with kernels that update all parameters at once on CUDA, and a cache-blocked PyTorch step elsewhere.

    Args:
        params: parameters or groups of them (fp32, bf16 or fp16, any mix, all on one device).
        lr: learning rate, a float or a 0-dim tensor (on the device if a CUDA graph is to follow its changes).
        betas: decay rates of the first and second moment. eps: added to sqrt(v). weight_decay: wd above.
        bias_correction, adam_w_mode, grad_averaging, use_nvlamb: see the formula at the top of this file.
        max_grad_norm: maximum of the global gradient norm over all groups; 0 or None for no clipping.
        impl: None uses the CUDA kernels for CUDA parameters if they can be compiled, and PyTorch otherwise. 'cuda' and
            'torch' are honoured or refused. On CUDA, the PyTorch step waits for the GPU at every norm.
        all_reduce: if the parameters are shards, a function that sums a tensor in place over all processes that own
            shards of the same tensors, with the same bits on each of them. None for whole parameters.

    All arguments except `max_grad_norm`, `impl` and `all_reduce` can be set per group.

    Shards: all processes create their optimizers with the same list of parameters, order, groups and hyperparameters,
    where each parameter is the process's piece of a tensor, of any shape, possibly empty. Each element belongs to one
    process. A step calls `all_reduce` twice, even if it is skipped: with a scalar, and with a tensor of shape
    (parameters, 2), both fp64 on the parameters' device. All processes must therefore step together, with the same
    `grad_scale`, and the same parameters must have gradients in all of them; an empty piece has one if its `.grad` is
    set. `state_dict()` holds this process's pieces and not the function. Copies and pickles of the optimizer keep the
    function, and fail if Python cannot copy it (pickle: a lambda).

    Attributes:
        last_grad_norm: fp32 scalar on the device, the global norm of the last step (after division by `grad_scale`).
        num_skipped: int64 scalar on the device, the number of steps skipped because that norm was not finite.
        grad_scale: optional scalar tensor by which gradients are divided; torch.amp.GradScaler sets it.
        master, gradient, exp_avg, exp_avg_sq: the flat fp32 buffers. low: the 16-bit one, as int16.

    State of a parameter in `state_dict()`: `step`, `exp_avg`, `exp_avg_sq`, and `master` for 16-bit parameters. These
    are views of the buffers. Clone them before saving only some, since torch.save writes whole buffers.

    CUDA graphs: first run one step with the same set of gradients. Keep `zero_grad()` inside the graph, or at least do
    not use `set_to_none=True`, and add no group afterwards. A float learning rate is fixed in the graph.

    Raises:
        ValueError: an unsupported dtype, device or hyperparameter, a DTensor, or two parameters that share memory.
        RuntimeError: impl='cuda', but compilation fails; parameters moved to another device or dtype after construction.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler: pass `grad_scale`, do not unscale

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
        impl: str | None = None,
        all_reduce: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        if max_grad_norm is not None and not 0 <= max_grad_norm < math.inf:
            raise ValueError(f"FusedLAMB: max_grad_norm={max_grad_norm}; use a number >= 0, or None for no clipping")
        self.max_grad_norm = max_grad_norm
        self.impl = impl
        self.all_reduce = all_reduce
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
            "grad_averaging": grad_averaging,
            "use_nvlamb": use_nvlamb,
        }
        super().__init__(params, defaults)
        self.num_skipped = torch.zeros((), dtype=torch.int64)
        self.last_grad_norm = torch.zeros((), dtype=torch.float32)
        self._build()

    # ---- the flat buffers ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Move all parameters and their state into new flat buffers.

        Gradients stay where they are: the next step copies them, and the next `zero_grad()` makes them views again.
        """
        named = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        # 16-bit parameters come first: their copy then shares the masters' offsets and holds no fp32 parameters.
        named.sort(key=lambda item: LOW_KINDS[item[0].dtype] == 0)
        self._params = [p for p, _ in named]
        device = self._params[0].device if self._params else torch.device("cpu")
        self._device = device
        self._use_cuda = _cuda.use_cuda("FusedLAMB", SOURCE, KERNELS, self.impl, device)

        self._offsets = []
        size = low_size = 0
        for p in self._params:
            self._offsets.append(size)
            size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
            if p.dtype != torch.float32:
                low_size = size

        self.master, self.gradient, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(size, dtype=torch.float32, device=device) for _ in range(4)
        )
        self.low = torch.zeros(low_size, dtype=torch.int16, device=device)
        self._step_counts = torch.zeros(len(self._params), dtype=torch.float32, device=device)
        self.num_skipped = self.num_skipped.to(device)
        self.last_grad_norm = self.last_grad_norm.to(device)

        self._gradient_views: list[torch.Tensor] = []
        old_state = {p: self.state.pop(p, {}) for p in self._params}
        for index, p in enumerate(self._params):
            self._gradient_views.append(self._view(self.gradient, index))
            self._view(self.master, index).copy_(old_state[p].get("master", p.detach()))
            self._point_parameter(index)
        self._attach_state()
        self._copy_state(old_state)
        self._versions = [p._version for p in self._params]
        self._make_tables(named)

    def _view(self, buffer: torch.Tensor, index: int) -> torch.Tensor:
        """Parameter `index`'s part of a flat buffer, in its shape and memory format."""
        p = self._params[index]
        # empty_like keeps the strides of any dense tensor (channels_last too), and is contiguous otherwise.
        strides = torch.empty_like(p, device="meta").stride()
        return buffer.as_strided(p.shape, strides, self._offsets[index])

    def _point_parameter(self, index: int) -> None:
        """Make the parameter a view of its buffer and keep its value."""
        p = self._params[index]
        target = self._view(self.master if p.dtype == torch.float32 else self.low.view(p.dtype), index)
        target.copy_(p.detach())
        p.data = target

    def _attach_state(self) -> None:
        for index, p in enumerate(self._params):
            self.state[p] = {
                "step": self._step_counts[index],
                "exp_avg": self._view(self.exp_avg, index),
                "exp_avg_sq": self._view(self.exp_avg_sq, index),
            }
            if p.dtype != torch.float32:
                self.state[p]["master"] = self._view(self.master, index)

    def _copy_state(self, source: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Copy state into the buffers. What is missing is initialised."""
        for p, state in self.state.items():
            for name, target in state.items():
                value = source.get(p, {}).get(name)
                if value is not None:
                    target.copy_(torch.as_tensor(value))
                elif name == "master":
                    target.copy_(p.detach())
                else:
                    target.zero_()

    def _make_tables(self, named: list[tuple[torch.Tensor, int]]) -> None:
        """Make what the kernels need besides the buffers: chunks, groups and flags. All sizes are int64."""
        device, count = self._device, len(self._params)
        self._hyper_rows: list[list[float]] = [[math.nan] * GROUP_FIELDS for _ in self.param_groups]
        self._group_of = [index for _, index in named]
        self._active = [True] * count
        self._dtypes = [p.dtype for p in self._params]
        if not self._use_cuda:
            return
        chunks, first_chunk = [], [0]
        for index, (p, offset) in enumerate(zip(self._params, self._offsets)):
            start = torch.arange(0, p.numel(), CHUNK, dtype=torch.int64)
            length = (p.numel() - start).clamp(max=CHUNK)
            chunks.append(torch.stack([start + offset, length, torch.full_like(start, index)], dim=1))
            first_chunk.append(first_chunk[-1] + start.numel())
        self._chunks = torch.cat(chunks).to(device)
        self._first_chunk = torch.tensor(first_chunk, dtype=torch.int64, device=device)
        self._segment_group = torch.tensor(self._group_of, dtype=torch.int64, device=device)
        low_kinds = [LOW_KINDS[p.dtype] for p in self._params]
        self._low_kinds = torch.tensor(low_kinds, dtype=torch.int32, device=device)
        self._hyper = torch.zeros(len(self.param_groups), GROUP_FIELDS, dtype=torch.float64, device=device)
        self._active_flags = torch.ones(count, dtype=torch.int32, device=device)
        self._partial = torch.empty(len(self._chunks), 2, dtype=torch.float64, device=device)
        self._steps = torch.empty(count, STEP_FIELDS, dtype=torch.float32, device=device)
        self._norms = torch.empty(count, 2, dtype=torch.float64, device=device)
        self._skip = torch.zeros((), dtype=torch.int32, device=device)

    # ---- the interface of torch.optim.Optimizer -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time. All parameters and their state move into larger buffers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "master"):
            self._build()

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, torch.Tensor):
            if lr.numel() != 1:
                raise ValueError(f"FusedLAMB: lr is a tensor of shape {tuple(lr.shape)}; use one with a single element")
        elif not 0 <= lr < math.inf:
            raise ValueError(f"FusedLAMB: lr={lr}; use a number >= 0")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"FusedLAMB: betas={group['betas']}; use two numbers in [0, 1)")
        for name in ("eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"FusedLAMB: {name}={group[name]}; use a number >= 0")
        group["params"] = list(dict.fromkeys(group["params"]))
        everything = [p for g in self.param_groups for p in g["params"]]
        owners: dict[int, torch.Tensor] = {}
        for p in everything:
            if hasattr(p, "to_local"):
                raise ValueError(
                    f"FusedLAMB: a parameter of shape {tuple(p.shape)} is a DTensor, as FSDP2 makes them; pass pieces that "
                    "are plain tensors, with all_reduce= for their norms, or use DistributedDataParallel"
                )
            if p.dtype not in LOW_KINDS or p.layout != torch.strided:
                raise ValueError(
                    f"FusedLAMB: a parameter of shape {tuple(p.shape)} is {p.dtype}, {p.layout}; parameters must be "
                    "dense and float32, bfloat16 or float16"
                )
            if p.device != everything[0].device:
                raise ValueError(
                    f"FusedLAMB: parameters are on {everything[0].device} and {p.device}; make one optimizer per device"
                )
            if p.numel() and owners.setdefault(p.data_ptr(), p) is not p:
                raise ValueError(
                    f"FusedLAMB: two parameters of shape {tuple(p.shape)} share memory; tie layers by assigning one "
                    "Parameter to both"
                )

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradient buffer and make every fp32 gradient a view of it. Other gradients become None.

        With `set_to_none=True` all gradients become None, as in torch.optim. The step then copies new gradients into the
        buffer, and skips parameters without one. Otherwise those have a gradient of zero and decay.
        """
        has_view = False
        for p, view in zip(self._params, self._gradient_views):
            if set_to_none or not p.requires_grad or getattr(p, "grad_dtype", p.dtype) != torch.float32:
                p.grad = None
            else:
                has_view = True
                if p.grad is not view:
                    p.grad = view
        if has_view:
            self.gradient.zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, bit for bit, into the existing buffers.

        The model loads its parameters itself, before or after.
        """
        loaded: dict[Any, dict[str, Any]] = {}

        # torch would round the state of a bf16 parameter to bf16, so its own code runs without state, between these two.
        def keep_state(_: torch.optim.Optimizer, full: dict[str, Any]) -> dict[str, Any]:
            ids = [i for group in full["param_groups"] for i in group["params"]]
            for i, p in zip(ids, (p for group in self.param_groups for p in group["params"])):
                if i in full["state"]:
                    loaded[p] = full["state"][i]
                    for name, value in loaded[p].items():
                        if name != "step" and isinstance(value, torch.Tensor) and value.shape != p.shape:
                            raise ValueError(
                                f"FusedLAMB: {name} of parameter {i} has shape {tuple(value.shape)} in the state "
                                f"dict, but the parameter has {tuple(p.shape)}; load it into the model it was saved from"
                            )
            return {**full, "state": {}}

        def fill_state(_: torch.optim.Optimizer) -> None:
            self._attach_state()
            self._copy_state(loaded)
            for group in self.param_groups:
                for name, value in self.defaults.items():
                    group.setdefault(name, value)

        handles = [
            self.register_load_state_dict_pre_hook(keep_state),  # the last of them: after the user's
            self.register_load_state_dict_post_hook(fill_state, prepend=True),  # before the user's
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("all_reduce", "impl", "max_grad_norm", "last_grad_norm", "num_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # unpickled or deep-copied; load_state_dict passes state and groups only
            self._build()

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: torch.Tensor | None = None
    ) -> Any:
        """Update the parameters. `closure`, if given, is called first with gradients enabled and returns the loss.

        Args:
            grad_scale: scalar tensor by which gradients are divided, such as a loss scale or a token count times one; by
                default the attribute of that name. Gradients themselves do not change.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._params:
            return loss
        self._adopt_foreign_writes()
        self._gather_gradients()
        scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        if self._use_cuda:
            self._step_cuda(scale)
        else:
            self._step_torch(scale)
        # The buffers were written without autograd's knowledge: tell it that the parameters changed.
        torch.autograd.graph.increment_version(self._params)
        self._versions = [p._version for p in self._params]
        return loss

    def _adopt_foreign_writes(self) -> None:
        """Adopt parameters that were re-pointed, or 16-bit ones that were written, since the last step.

        Loading a checkpoint into the model does that. Masters keep their digits where they still round to the parameter.
        """
        for index, p in enumerate(self._params):
            is_low = p.dtype != torch.float32
            buffer, width = (self.low, 2) if is_low else (self.master, 4)
            is_moved = p.numel() > 0 and p.data_ptr() != buffer.data_ptr() + width * self._offsets[index]
            if is_moved:
                if p.device != self._device or p.dtype != self._dtypes[index]:
                    raise RuntimeError(
                        f"FusedLAMB: a parameter of shape {tuple(p.shape)} became {p.dtype} on {p.device} after the "
                        "optimizer was made; move and cast the model first, then make the optimizer"
                    )
                self._point_parameter(index)
            if is_low and (is_moved or p._version != self._versions[index]):
                master = self._view(self.master, index)
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))

    def _gather_gradients(self) -> None:
        """Copy gradients that are not views of the gradient buffer into it, and record which parameters have one."""
        copies: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        active = []
        for p, view in zip(self._params, self._gradient_views):
            gradient = p.grad
            active.append(gradient is not None)
            if gradient is None or gradient is view:
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError(f"FusedLAMB: a gradient of shape {tuple(p.shape)} is sparse; make it dense")
            is_same = gradient.data_ptr() == view.data_ptr() and gradient.stride() == view.stride()
            if is_same and gradient.dtype == view.dtype:
                continue  # the same memory through another tensor object
            targets, sources = copies.setdefault(gradient.dtype, ([], []))
            targets.append(view)
            sources.append(gradient)
        for targets, sources in copies.values():  # by dtype: one fused launch each on CUDA
            torch._foreach_copy_(targets, sources)
        if self._use_cuda and active != self._active:
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "FusedLAMB: during CUDA graph capture, other parameters have gradients than in the step before; run "
                    "one such step before capturing"
                )
            self._active_flags.copy_(torch.tensor(active, dtype=torch.int32), non_blocking=True)
        self._active = active

    def _group_row(self, group: dict[str, Any], lr: float) -> list[float]:
        """struct Group of csrc/fused_lamb.cu."""
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        return [
            lr,
            beta1,
            beta2,
            1 - beta1 if group["grad_averaging"] else 1.0,
            group["eps"],
            weight_decay,
            float(group["bias_correction"]),
            float(group["adam_w_mode"]),
            float(group["use_nvlamb"] or weight_decay != 0),
        ]

    def _step_cuda(self, grad_scale: torch.Tensor | None) -> None:
        # Numbers reach the device as kernel arguments of fill_, and only when they change. So nothing waits, and a
        # captured graph holds them.
        for row, (group, known) in enumerate(zip(self.param_groups, self._hyper_rows)):
            lr = group["lr"]
            is_on_device = isinstance(lr, torch.Tensor) and lr.device == self._device
            values = self._group_row(group, math.nan if is_on_device else float(lr))
            for column, value in enumerate(values):
                if column == 0 and is_on_device:
                    self._hyper[row, column].copy_(lr.squeeze())
                elif value != known[column]:
                    self._hyper[row, column].fill_(value)
            known[:] = values
        if grad_scale is not None:
            grad_scale = torch.as_tensor(grad_scale).to(self._device, torch.float32, non_blocking=True)
        num_chunks, num_segments = len(self._chunks), len(self._params)

        def launch(kernel: str, grid: int, block: int, *arguments: Any) -> None:
            _cuda.launch(SOURCE, kernel, grid, block, self._device, *arguments)

        launch("lamb_square_gradients", num_chunks, 256, self.gradient, self._chunks, self._active_flags, self._partial)
        squares, num_squares = self._partial, num_chunks
        if self.all_reduce is not None:
            squares, num_squares = self._partial.view(-1)[:num_chunks].sum(), 1
            self.all_reduce(squares)
        launch(
            "lamb_prepare", 1, 1024,
            squares, num_squares, self._hyper, self._segment_group, self._active_flags, num_segments,
            float(self.max_grad_norm or 0), grad_scale, self._step_counts,
            self._steps, self._skip, self.last_grad_norm, self.num_skipped,
        )  # fmt: skip
        launch(
            "lamb_moments", num_chunks, 256,
            self.gradient, self.master, self.exp_avg, self.exp_avg_sq,
            self._chunks, self._active_flags, self._steps, self._skip, self._partial,
        )  # fmt: skip
        launch(
            "lamb_norms", num_segments, 128,
            self._partial, self._first_chunk, self._active_flags, self._skip, self._norms,
        )  # fmt: skip
        if self.all_reduce is not None:
            self.all_reduce(self._norms)
        launch(
            "lamb_apply", num_chunks, 256,
            self.exp_avg, self.exp_avg_sq, self._chunks, self._active_flags, self._steps, self._norms,
            self._hyper, self._segment_group, self._low_kinds, self._skip, self.master, self.low,
        )  # fmt: skip

    def _step_torch(self, grad_scale: torch.Tensor | None) -> None:
        """The same step in PyTorch, slice by slice so that data stays in cache between passes."""
        chunk = CPU_CHUNK * torch.get_num_threads() if self._device.type == "cpu" else 1 << 30
        scale = 1.0 if grad_scale is None else float(grad_scale)
        active = [index for index, has_gradient in enumerate(self._active) if has_gradient]
        squares = [torch.dot(g, g) for index in active for g in self._slices(self.gradient, index, chunk)]
        total = torch.stack([*squares, torch.zeros((), device=self._device)]).double().sum()
        if self.all_reduce is not None:
            self.all_reduce(total)
        norm = math.sqrt(total.item()) / abs(scale) if scale else math.nan
        self.last_grad_norm.fill_(norm)
        norms = torch.zeros(len(self._params), 2, dtype=torch.float64, device=self._device)
        if not norm <= torch.finfo(torch.float32).max:
            self.num_skipped.add_(1)
            if self.all_reduce is not None:
                self.all_reduce(norms)  # other processes may run the CUDA kernels, which always make this call
            return
        clip = norm / self.max_grad_norm if self.max_grad_norm and norm > self.max_grad_norm else 1.0
        counts = self._step_counts.add_(torch.tensor(self._active, dtype=torch.float32).to(self._device)).tolist()
        rows = [self._group_row(group, float(group["lr"])) for group in self.param_groups]
        gradient_scratch, update_scratch = torch.empty(2, min(chunk, self.master.numel()), device=self._device)
        steps = []
        for index in active:
            row, factor = rows[self._group_of[index]], 1 / (scale * clip)
            scratch = gradient_scratch, update_scratch
            steps.append(self._step_segment(index, row, counts[index], factor, chunk, *scratch, norms[index]))
        # One segment at a time keeps small ones in cache; all at once needs a single reduction.
        for batch in [[step] for step in steps] if self.all_reduce is None else [steps]:
            for step in batch:
                next(step)
            if self.all_reduce is not None:
                self.all_reduce(norms)
            for step in batch:
                next(step, None)

    def _slices(self, buffer: torch.Tensor, index: int, chunk: int) -> Iterator[torch.Tensor]:
        start, size = self._offsets[index], self._params[index].numel()
        return iter(buffer[start : start + size].split(chunk)) if size else iter(())

    def _step_segment(
        self,
        index: int,
        row: list[float],
        count: float,
        gradient_factor: float,
        chunk: int,
        gradient_scratch: torch.Tensor,
        update_scratch: torch.Tensor,
        norms: torch.Tensor,
    ) -> Iterator[None]:
        """Update the moments and write |p|^2 and |u|^2 to `norms`. When resumed, update p with the values there."""
        lr, beta1, beta2, beta3, eps, weight_decay, bias_correction, decoupled, adaptive = row
        root = math.sqrt(1 - beta2**count) if bias_correction else 1.0
        # (m / c1) / (sqrt(v) / root + eps) = factor * m / (sqrt(v) + eps * root) saves two operations.
        factor = root / (1 - beta1**count) if bias_correction else 1.0

        def compute_update(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            denominator = torch.sqrt(v, out=gradient_scratch[: p.numel()]).add_(eps * root)
            if decoupled and weight_decay:
                update = torch.mul(p, weight_decay, out=update_scratch[: p.numel()])
                return update.addcdiv_(m, denominator, value=factor)
            return torch.div(m, denominator, out=update_scratch[: p.numel()]).mul_(factor)

        slices = [
            list(self._slices(buffer, index, chunk))
            for buffer in (self.gradient, self.master, self.exp_avg, self.exp_avg_sq)
        ]
        squares = []
        for g, p, m, v in zip(*slices):
            scaled = torch.mul(g, gradient_factor, out=gradient_scratch[: g.numel()])
            if weight_decay and not decoupled:
                scaled.add_(p, alpha=weight_decay)
            if beta3 == 1 - beta1:
                m.lerp_(scaled, beta3)
            else:
                m.mul_(beta1).add_(scaled, alpha=beta3)
            v.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            if adaptive:
                u = compute_update(p, m, v)
                squares.append(torch.stack([torch.dot(p, p), torch.dot(u, u)]))
        if squares:
            torch.sum(torch.stack(squares).double(), 0, out=norms)
        yield
        if adaptive:
            p_squares, u_squares = norms.tolist()
            if p_squares > 0 and u_squares > 0:
                lr *= math.sqrt(p_squares / u_squares)
        low = self.low.view(self._params[index].dtype) if LOW_KINDS[self._params[index].dtype] else None
        low_slices = [None] * len(slices[0]) if low is None else self._slices(low, index, chunk)
        for (_, p, m, v), copy in zip(zip(*slices), low_slices):
            p.add_(compute_update(p, m, v), alpha=-lr)
            if copy is not None:
                copy.copy_(p)
