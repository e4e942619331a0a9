"""What every module has in common with PyTorch's own: device, dtype, reset_parameters, extra_repr, absent parameters."""

from __future__ import annotations

import pytest
import torch
from fastroberta_kernels.attention import SelfAttention
from fastroberta_kernels.cross_entropy import MaskedLMHead
from fastroberta_kernels.embedding import Embeddings
from fastroberta_kernels.gelu import BiasGELU
from fastroberta_kernels.layer_norm import DropoutAddLayerNorm, LayerNorm

MODULES = {
    SelfAttention: (8, 2),
    MaskedLMHead: (8, 40),
    Embeddings: (40, 8, 16, 1, 1),
    BiasGELU: (8,),
    LayerNorm: (8,),
    DropoutAddLayerNorm: (8,),
}
every_module = pytest.mark.parametrize("module_class", MODULES)


@every_module
def test_modules_are_made_on_a_device_in_a_dtype(module_class):
    module = module_class(*MODULES[module_class], device="meta", dtype=torch.bfloat16)
    assert list(module.parameters())
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in module.parameters())


@every_module
def test_reset_parameters_draws_what_the_constructor_drew(module_class):
    torch.manual_seed(0)
    expected = module_class(*MODULES[module_class]).state_dict()
    module = module_class(*MODULES[module_class], device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@every_module
def test_modules_say_how_they_were_made(module_class):
    assert module_class(*MODULES[module_class]).extra_repr()


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norms_without_parameters(options):
    x, residual = torch.randn(2, 3, 8).unbind()
    theirs = torch.nn.LayerNorm(8, **options)
    ours, fused = LayerNorm(8, **options), DropoutAddLayerNorm(8, p=0.0, **options)
    for module in (ours, fused):
        module.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(fused(x, residual), theirs(x + residual))
