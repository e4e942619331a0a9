"""What every module has in common with PyTorch's own: device, dtype, reset_parameters, extra_repr, absent parameters."""

from __future__ import annotations

import pytest
import torch
from fastroberta_kernels import _dispatch
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
needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
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


def test_modules_without_biases():
    """Each has the parameters that are left, and computes what it would with biases of zero."""
    torch.manual_seed(0)
    hidden, decoder, labels = torch.randn(2, 3, 8), torch.randn(40, 8), torch.arange(6).view(2, 3)
    ids = torch.tensor([[3, 4, 1], [5, 6, 7]])
    calls = {
        SelfAttention: lambda module: module(hidden),
        MaskedLMHead: lambda module: module(hidden, decoder, labels).loss,
        Embeddings: lambda module: module.eval()(ids),
        BiasGELU: lambda module: module(hidden),
    }
    for module_class, call in calls.items():
        whole, without = (module_class(*MODULES[module_class], bias=bias) for bias in (True, False))
        for name, parameter in whole.named_parameters():
            if "bias" in name:
                torch.nn.init.zeros_(parameter)
        names = [name for name, _ in without.named_parameters()]
        assert names == [name for name, _ in whole.named_parameters() if "bias" not in name]
        missing, unexpected = whole.load_state_dict(without.state_dict(), strict=False)
        assert not unexpected and all("bias" in name for name in missing)
        without.reset_parameters()
        assert without.extra_repr()
        without.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in names})
        torch.testing.assert_close(call(without), call(whole))
    head = MaskedLMHead(8, 40, bias=False)
    assert head.logits(hidden, decoder).shape == (2, 3, 40)


@both
def test_embeddings_without_bias_compute_the_same(impl, device):
    """A bias of zeros and none give the same gradients too."""
    results = []
    for bias in (True, False):
        torch.manual_seed(0)
        module = Embeddings(40, 8, 16, 1, 1, dropout=0.0, bias=bias).to(device if impl == "triton" else "cpu")
        ids = torch.tensor([[3, 4, 1], [5, 6, 7]], device=module.LayerNorm.weight.device)
        out = module(ids, impl=impl)
        out.square().sum().backward()
        results.append((out, module.word_embeddings.weight.grad, module.LayerNorm.weight.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norms_without_parameters(options):
    x, residual = torch.randn(2, 3, 8).unbind()
    theirs = torch.nn.LayerNorm(8, **options)
    ours, fused = LayerNorm(8, **options), DropoutAddLayerNorm(8, p=0.0, **options)
    for module in (ours, fused):
        module.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(fused(x, residual), theirs(x + residual))
