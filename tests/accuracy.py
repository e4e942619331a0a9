"""How exact is exact enough: as exact as PyTorch's own operation in the same dtype, measured against fp64.

From `differentiate` on an operation is called with its inputs by name, and its results have names: y, and dx for an input x.
"""

import torch


def assert_as_exact_as_torch(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str, factor: float = 1.5
) -> None:
    """Hold `ours` to max and RMS error <= factor * that of `theirs` plus one unit in the last place, without a bias.

    Args:
        ours, theirs: results in the dtype under test. exact: the fp64 result from the same (rounded) inputs.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, expected {theirs.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.double().cpu()
    our_error, their_error = ours.double().cpu() - exact, theirs.double().cpu() - exact
    assert torch.isfinite(our_error).all(), f"{what}: not finite"
    unit = torch.finfo(ours.dtype).eps
    largest = exact.abs().max().item()
    typical = exact.square().mean().sqrt().item()
    for name, value, reference, slack in (
        ("max", our_error.abs().max(), their_error.abs().max(), unit * largest),
        ("rms", our_error.square().mean().sqrt(), their_error.square().mean().sqrt(), unit * typical),
    ):
        bound = factor * reference.item() + slack
        assert value.item() <= bound, f"{what}: {name} error {value.item():.3e} > {bound:.3e} ({factor} x torch + ulp)"
    # Rounding errors are independent and even out: a mean error of many standard errors is a systematic fault.
    count = exact.numel()
    if count >= 1000:
        bound = 6 * max(our_error.std().item(), unit * typical / 4) / count**0.5 + abs(their_error.mean().item()) * 1.5
        assert abs(our_error.mean().item()) <= bound, f"{what}: mean error {our_error.mean().item():.3e} > {bound:.3e}"


def differentiate(function, inputs, dy):
    """The output and the gradient of every input, by name."""
    y = function(**inputs)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(inputs, gradients)}


def assert_gradients_as_exact_as_torch(function, composed, inputs, dy, what=""):
    """Hold the output of `function` and the gradient of every input to those of `composed`, from PyTorch's own."""

    def to(dtype=None):
        return {name: t.detach().cpu().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}

    ours, theirs = differentiate(function, inputs, dy), differentiate(composed, to(), dy.cpu())
    exact = differentiate(composed, to(torch.float64), dy.cpu().double())
    for name in exact:
        assert_as_exact_as_torch(ours[name], theirs[name], exact[name], f"{what}{name}")


def assert_equal(results, others):
    """Hold tensors to those of the same names, bit for bit."""
    for name in results:
        assert torch.equal(results[name], others[name]), name


def assert_strides_change_nothing(function, inputs, dy):
    """Hold results from inputs and upstream gradients that are not contiguous to those from contiguous ones."""

    def scatter(tensor):
        """The same values, no two neighbours next to each other in memory."""
        wide = torch.stack((tensor.detach(), torch.full_like(tensor, float("nan"))), -1)
        return wide[..., 0].requires_grad_()

    scattered = {name: scatter(tensor) for name, tensor in inputs.items()}
    assert_equal(differentiate(function, inputs, dy), differentiate(function, scattered, scatter(dy)))
    expanded = differentiate(function, inputs, torch.ones((), device=dy.device).expand(dy.shape))
    assert_equal(differentiate(function, inputs, torch.ones_like(dy)), expanded)


def assert_compiled_equals_eager(function, inputs, dy, impl):
    """Bit for bit, but for what inductor makes of the twin."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    eager = differentiate(function, inputs, dy)
    compiled = differentiate(torch.compile(function, fullgraph=True, backend=backend), inputs, dy)
    if impl == "torch" and backend == "inductor":
        torch.testing.assert_close(compiled, eager)
    else:
        assert_equal(compiled, eager)
