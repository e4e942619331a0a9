"""How exact is exact enough: as exact as PyTorch's own operation in the same dtype, measured against fp64."""

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
