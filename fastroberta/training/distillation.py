"""Distillation: a student learns from the predictions and hidden states of a larger teacher, as DistilRoBERTa did.

For masked tokens i with labels y, logits s_i of the student and t_i of the teacher, their last hidden states h_i and g_i,
and temperature T (Sanh et al., arXiv 1910.01108, section 3; Hinton et al., arXiv 1503.02531, for the factor T^2):

    loss = sum_i  alpha_ce  T^2 KL(softmax(t_i / T) || softmax(s_i / T))
                + alpha_mlm (-log softmax(s_i)[y_i])
                + alpha_cos (1 - cos(h_i, g_i))

The teacher reads the same masked input in eval mode and without gradients, and its logits exist for masked tokens only.

DistilBERT's script takes hidden states of all tokens; here they are those of the masked tokens too. All tokens would need
the last layer of both models on every row, not on 15% of them: 9% more work for a student of 6 and a teacher of 12 layers.

The student starts from evenly spaced layers of the teacher: layer i from the teacher's layer floor(i n / m), for m layers
of n. That is every second layer, from the first on, where m is half of n. Embeddings and head are the teacher's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fastroberta_kernels.cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..checkpoint import verify_directory
from ..config import DistillationConfig, TrainConfig
from ..corpus.manifest import Manifest
from ..corpus.shards import file_sha256
from ..corpus.tokenizer import load_tokenizer, tokenizer_hash
from ..errors import ConfigurationError
from ..hf import load_huggingface, longest_sequence
from ..model import WHOLE_SEQUENCE, AttentionScope, RobertaForMaskedLM

# What teacher and student must have in common: the student starts from parameters of these shapes.
SHARED_SIZES = (
    "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps", "hidden_act",
    "type_vocab_size", "tie_word_embeddings",
)  # fmt: skip
CHUNK_ROWS = 512  # of logits at a time: 0.5 GB with 50,304 classes
ROWS_IN_CACHE = 16  # a CPU takes the softmax of so many at a time


class Distillation:
    """The loss of a student with its teacher.

    Args:
        student, teacher: of the same sizes but for the number of layers. The teacher is put into eval mode, and its linear
            layers are rounded to the student's compute dtype, in which their products run anyway.
        settings: temperature and weights of the three terms.
        sha256: of the teacher's weights, which belongs to the run.
    """

    def __init__(
        self, student: RobertaForMaskedLM, teacher: RobertaForMaskedLM, settings: DistillationConfig, sha256: str = ""
    ):
        # Here, not as a decorator: it imports the compiler, which takes a second.
        self._soft_target_loss = torch.compiler.disable(soft_target_loss)
        self.sha256 = sha256
        self._student, self._settings = student, settings
        self._teacher = teacher.eval().requires_grad_(False)
        teacher.compute_dtype = student.compute_dtype
        for module in teacher.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.to(student.compute_dtype)
        self._decoder = teacher.decoder_weight.to(student.compute_dtype)
        self._decoder_bias = teacher.lm_head.bias.to(student.compute_dtype)

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        scope: AttentionScope = WHOLE_SEQUENCE,
        dropout_keys: Tensor | None = None,
        first_sample: Tensor | None = None,
    ) -> LinearCrossEntropyOutput:
        """As `RobertaForMaskedLM.loss`, with the gradient of all three terms.

        The value is that of masked language modelling alone, so that it can be compared with the held-out loss and with
        runs that have no teacher.
        """
        settings, student = self._settings, self._student
        labels = labels.flatten()
        is_used = labels != -100
        teacher_hidden = None
        if settings.alpha_ce or settings.alpha_cos:
            # First, so that its activations are gone before the student's exist.
            with torch.no_grad():
                teacher_hidden = self._teacher.encode(input_ids, scope, positions=positions).flatten(0, 1)
        hidden = student.encode(input_ids, scope, dropout_keys, first_sample, positions).flatten(0, 1)
        head, decoder = student.lm_head, student.decoder_weight
        num_classes = student.config.vocab_size
        assert num_classes is not None  # the model has checked
        features = head.transform(hidden.masked_fill(~is_used[:, None], 0.0))
        result = linear_cross_entropy(features, decoder, head.bias, labels, reduction="sum", num_classes=num_classes)
        objective = settings.alpha_mlm * result.loss
        if teacher_hidden is not None and settings.alpha_ce:
            with torch.no_grad():
                teacher_features = self._teacher.lm_head.transform(teacher_hidden)
            objective = objective + settings.alpha_ce * self._soft_target_loss(
                features, decoder, head.bias, teacher_features, self._decoder, self._decoder_bias, is_used,
                settings.temperature, num_classes,
            )  # fmt: skip
        if teacher_hidden is not None and settings.alpha_cos:
            sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
            cosine = F.cosine_similarity(hidden.to(sum_dtype), teacher_hidden.to(sum_dtype), dim=1)
            objective = objective + settings.alpha_cos * ((1 - cosine) * is_used).sum()
        # The difference is zero, and carries the gradient.
        return result._replace(loss=result.loss.detach() + (objective - objective.detach()))


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        teacher_features: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor,
        is_used: Tensor,
        temperature: float,
        num_classes: int,
    ) -> Tensor:
        matrix, matrix_bias = weight.to(features.dtype), bias.to(features.dtype)
        sum_dtype = torch.promote_types(features.dtype, torch.float32)
        loss = torch.zeros((), dtype=sum_dtype, device=features.device)
        d_features = torch.empty_like(features)
        d_weight, d_bias = (torch.zeros_like(one, dtype=sum_dtype) for one in (weight, bias))
        # Made once: in each turn of the loop they would exist twice.
        buffers = [features.new_empty(min(CHUNK_ROWS, len(features)), len(weight)) for _ in range(2)]
        size = ROWS_IN_CACHE if features.device.type == "cpu" else CHUNK_ROWS
        for start in range(0, len(features), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits, teacher_logits = (buffer[: len(features[rows])] for buffer in buffers)
            torch.addmm(matrix_bias, features[rows], matrix.T, out=logits)
            torch.addmm(teacher_bias, teacher_features[rows], teacher_weight.T, out=teacher_logits)
            used = is_used[rows, None].to(sum_dtype)
            for s, t, is_row_used in zip(logits.split(size), teacher_logits.split(size), used.split(size)):
                log_q, log_p = (x[:, :num_classes].to(sum_dtype).div(temperature).log_softmax(1) for x in (s, t))
                p = log_p.exp()
                divergence = log_p.sub_(log_q).mul_(p).sum(1, keepdim=True)
                loss += temperature**2 * (divergence * is_row_used).sum()
                # From here on the logits are their own gradient, as in linear_cross_entropy.
                s[:, :num_classes] = log_q.exp_().sub_(p).mul_(temperature * is_row_used)
            logits[:, num_classes:].zero_()
            torch.mm(logits, matrix, out=d_features[rows])
            d_bias += logits.sum(0, dtype=sum_dtype)
            if d_weight.dtype == logits.dtype:
                d_weight.addmm_(logits.T, features[rows])
            else:
                d_weight += torch.mm(logits.T, features[rows])
        ctx.gradients = d_features, d_weight, d_bias
        ctx.dtypes = features.dtype, weight.dtype, bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        # With one dimension the scale stays fp32: CUDA would round a scalar tensor to bf16 before multiplying.
        scale = upstream[0].reshape(1)
        results = [
            (one.mul_(scale) if one.dtype == scale.dtype else one * scale).to(dtype)
            for one, dtype in zip(gradients, ctx.dtypes)
        ]
        return *results, *(None,) * 6


def soft_target_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor,
    is_used: Tensor,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """T^2 sum_i KL(softmax(t_i / T) || softmax(s_i / T)), with logits s = features weight^T + bias; t is the teacher's.

    Never holds more than 512 rows of both logits. As in `linear_cross_entropy`, the gradient for s, which is
    T (softmax(s / T) - softmax(t / T)), becomes those of features, weight and bias in the forward, chunk by chunk; the
    backward scales them. Beyond inputs and gradients the peak is 512 V logits of each model and, on a GPU, 2048 V fp32
    numbers: 0.5 GB in bf16 with V = 50304. The student's logits are computed again, besides those of
    `linear_cross_entropy`: 6 m d V operations for m masked tokens, 7% of a step of 6 layers with a teacher of 12.

    Args:
        features, teacher_features: (N, d), fp32, bf16, fp16 or fp64.
        weight: (V, d), and bias: (V,), in features' dtype or wider. teacher_weight, teacher_bias: alike, in its dtype.
        is_used: bool (N,); the other rows have no loss and no gradient.
        num_classes: how many rows of the weights are classes; the others are padding.
    Returns:
        fp32 (fp64 for fp64) scalar. There is no second backward.
    """
    return _SoftTargetLoss.apply(
        features, weight, bias, teacher_features, teacher_weight, teacher_bias, is_used, temperature, num_classes
    )


def prepare_distillation(
    student: RobertaForMaskedLM, config: TrainConfig, manifest: Manifest, device: torch.device
) -> Distillation | None:
    """The teacher of `distill_from`, on its device, or None for a run without one.

    The student, on the CPU, gets its initial weights from the teacher, unless `init_from` has given it others.

    Raises:
        CheckpointError: `distill_from` holds no RoBERTa, or is damaged.
        ConfigurationError: its tokenizer or its sizes are not those of the run.
    """
    if config.distill_from is None:
        return None
    directory = Path(config.distill_from)
    verify_directory(directory)
    teacher = load_huggingface(directory)
    if tokenizer_hash(load_tokenizer(directory)) != manifest.tokenizer_sha256:
        raise ConfigurationError(
            f"distill_from: {directory} has another tokenizer than {manifest.directory}; prepare the data with "
            f"--tokenizer {directory}"
        )
    for name in SHARED_SIZES:
        ours, theirs = getattr(config.model, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ConfigurationError(
                f"model.{name} = {ours}, but the teacher {directory} has {theirs}, and a student shares everything with its "
                f"teacher but the number of layers: set model.{name} to {theirs}"
            )
    positions = teacher.config.max_position_embeddings
    if config.model.max_position_embeddings > positions:
        raise ConfigurationError(
            f"model.max_position_embeddings = {config.model.max_position_embeddings}, but the teacher {directory} has only "
            f"{positions}: lower max_seq_length to {longest_sequence(positions, teacher.pad_token_id)} at most"
        )
    depth = config.distillation.teacher_layers = teacher.config.num_hidden_layers
    if config.model.num_hidden_layers > depth:
        raise ConfigurationError(
            f"model.num_hidden_layers = {config.model.num_hidden_layers}, but the teacher {directory} has only {depth}: a "
            "student has at most as many layers as its teacher"
        )
    if config.init_from is None:
        start_from_teacher(student, teacher)
    weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    sha256 = ",".join(map(file_sha256, weights))
    return Distillation(student, teacher.to(device), config.distillation, sha256)


def choose_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher's layers that a student starts from, evenly spaced: every second one for a student of half the depth."""
    return [index * teacher_layers // student_layers for index in range(student_layers)]


@torch.no_grad()
def start_from_teacher(student: RobertaForMaskedLM, teacher: RobertaForMaskedLM) -> None:
    """Copy the teacher's embeddings, its head, and those of its layers that `choose_layers` names.

    A student for shorter sequences takes the first rows of the position table.
    """
    theirs, chosen = teacher.state_dict(), choose_layers(len(teacher.layer), len(student.layer))
    for name, tensor in student.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "layer":
            index, _, rest = rest.partition(".")
            name = f"layer.{chosen[int(index)]}.{rest}"
        tensor.copy_(theirs[name][: len(tensor)])


def describe_teacher(config: TrainConfig) -> str:
    """The teacher of a run in a line."""
    depth, settings = config.distillation.teacher_layers, config.distillation
    layers = ", ".join(map(str, choose_layers(depth, config.model.num_hidden_layers)))
    start = f"starts from layers {layers}" if config.init_from is None else f"starts from {config.init_from}"
    return (
        f"teacher {config.distill_from}: {depth} layers; the student {start}; temperature {settings.temperature:g}, weights "
        f"{settings.alpha_ce:g} (soft targets), {settings.alpha_mlm:g} (masked LM), {settings.alpha_cos:g} (cosine)"
    )
