"""Small models of every family that `huggingface.apply` knows, batches for them, and a comparison of their gradients."""

from __future__ import annotations

from typing import Any

import torch
import transformers

KINDS = ("attention", "layer_norm", "gelu", "embedding", "mlm_head")
VOCABULARY = 97
# Prefix of the classes, id of padding, settings.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "roberta": ("Roberta", 1, {}),
    "bert": ("Bert", 0, {}),
    "xlm-roberta": ("XLMRoberta", 1, {}),
    "camembert": ("Camembert", 1, {}),
    "data2vec-text": ("Data2VecText", 1, {}),
    "electra": ("Electra", 0, {"embedding_size": 24}),
    "distilbert": ("DistilBert", 0, {}),
    "mpnet": ("MPNet", 1, {}),
    "esm": ("Esm", 1, {"mask_token_id": 5, "token_dropout": True, "position_embedding_type": "rotary"}),
}
DISTILBERT_NAMES = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout", "hidden_act": "activation",
    "attention_probs_dropout_prob": "attention_dropout",
}  # fmt: skip


def make_config(config_class, pad_token_id, **settings):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": pad_token_id,
        "initializer_range": 0.2,  # with small weights attention would be flat, and an error in it invisible
        **settings,
    }
    if config_class is transformers.DistilBertConfig:
        settings = {DISTILBERT_NAMES.get(name, name): value for name, value in settings.items()}
    elif config_class not in (transformers.MPNetConfig, transformers.EsmConfig):
        settings.setdefault("type_vocab_size", 2)
    return config_class(**settings)


def make_model(name: str = "roberta", task: str = "ForMaskedLM", **settings):
    """A model in training mode, the same at every call."""
    torch.manual_seed(0)
    prefix, pad_token_id, own_settings = MODELS[name]
    config = make_config(getattr(transformers, f"{prefix}Config"), pad_token_id, **{**own_settings, **settings})
    model = getattr(transformers, f"{prefix}{task}")(config).train()
    # Initial biases are zero and norms the identity: nothing would notice one that is forgotten.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_batch(model, padding: str = "right", device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 11:] = 0
        mask[2, 1:] = 0
    elif padding == "anywhere":
        mask[0, :5] = 0
        mask[1, 3:6] = 0
        mask[1, 15:] = 0
    ids[mask == 0] = model.config.pad_token_id
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.3) & (mask == 1), ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    if padding != "none":
        batch["attention_mask"] = mask
    return {name: tensor.to(device) for name, tensor in batch.items()}


def run(model, batch, **arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(**batch, **arguments).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_close(found, expected, relative: float) -> None:
    """Loss and gradients, by the norm of each gradient; keys' biases have none but rounding errors."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert abs(loss - expected_loss) <= relative * abs(expected_loss), (loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    assert whole > 0
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        bound = relative * (expected_gradients[name].norm() + 1e-2 * whole)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def only(*kinds: str) -> dict[str, bool]:
    return {kind: kind in kinds for kind in KINDS}
