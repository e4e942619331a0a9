"""What can be configured: one dataclass a program part, one sentence a field, which is also the text of --help.

Names are Hugging Face's where it has one; fairseq's name stands in brackets. Values come, each overriding the one
before, from the defaults here, from the presets or files named by --config, and from the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigurationError


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, valid: str | None = None, positional: bool = False
) -> Any:
    """A dataclass field with its sentence for --help; without a default it is required.

    valid is the interval that numbers must lie in, as mathematics writes it: "[0, 1)". A positional field is given
    on the command line without its name; one of type list[str] comes last and takes all words there are, at least one.
    """
    metadata = {"help": help, "valid": valid, "positional": positional}
    if isinstance(default, type):  # list, which every instance needs anew
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The encoder. The rest of RoBERTa is fixed: exact GELU, one token type, special ids as the tokenizer has them."""

    vocab_size: int | None = setting(None, "ids of the vocabulary; null takes the data's tokenizer", valid="[6, inf)")
    hidden_size: int = setting(768, "width of the encoder [encoder_embed_dim]", valid="[1, inf)")
    num_hidden_layers: int = setting(12, "encoder layers [encoder_layers]", valid="[1, inf)")
    num_attention_heads: int = setting(12, "heads a layer [encoder_attention_heads]", valid="[1, inf)")
    intermediate_size: int = setting(3072, "width inside the MLP [encoder_ffn_embed_dim]", valid="[1, inf)")
    hidden_dropout_prob: float = setting(0.1, "dropout on hidden states [dropout]", valid="[0, 1)")
    attention_probs_dropout_prob: float = setting(
        0.1, "dropout on attention probabilities [attention_dropout]", valid="[0, 1)"
    )
    max_position_embeddings: int = setting(
        514, "rows of the position table, two more than the longest sequence [max_positions + 2]", valid="[3, inf)"
    )
    layer_norm_eps: float = setting(1e-5, "added to the variance in LayerNorm", valid="(0, 1)")
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", valid="(0, inf)")

    def check(self) -> None:
        """Refuse what no single field shows."""
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"model.hidden_size = {self.hidden_size} must be a multiple of "
                f"model.num_attention_heads = {self.num_attention_heads}"
            )
        if self.hidden_size // self.num_attention_heads > 128:
            raise ConfigurationError(
                f"model.num_attention_heads = {self.num_attention_heads} makes heads of "
                f"{self.hidden_size // self.num_attention_heads}, and attention takes at most 128: "
                f"use {-(-self.hidden_size // 128)} heads or more"
            )


@dataclass
class OptimizerConfig:
    """How a gradient becomes an update."""

    name: Literal["adamw", "lamb"] = setting("adamw", "update rule [optimizer]")
    learning_rate: float = setting(6e-4, "highest learning rate, reached after the warm-up [lr]", valid="(0, inf)")
    betas: tuple[float, float] = setting(
        (0.9, 0.98), "decay of the running means of the gradient and of its square [adam_betas]", valid="[0, 1)"
    )
    eps: float = setting(1e-6, "added to the root of the second moment [adam_eps]", valid="(0, inf)")
    weight_decay: float = setting(0.01, "decoupled weight decay", valid="[0, inf)")
    decay: Literal["all", "no_bias_norm"] = setting(
        "all", "what decays: every parameter (fairseq), or all but biases and LayerNorm (BERT, Hugging Face)"
    )
    max_grad_norm: float = setting(0.0, "clip the global gradient norm to this; 0 = off [clip_norm]", valid="[0, inf)")


@dataclass
class LRSchedulerConfig:
    """The learning rate over the run: a linear warm-up from 0, then a decay to 0 at max_steps."""

    name: Literal["linear", "polynomial", "cosine", "constant"] = setting(
        "linear", "shape of the decay; constant has none [lr_scheduler]"
    )
    warmup_steps: int = setting(24_000, "steps from 0 to the highest rate [warmup_updates]", valid="[0, inf)")
    power: float = setting(1.0, "exponent of the polynomial decay, and of no other [power]", valid="(0, inf)")

    def check(self) -> None:
        """Refuse what no single field shows."""
        if self.power != 1 and self.name != "polynomial":
            raise ConfigurationError(
                f"lr_scheduler.power = {self.power} belongs to the polynomial schedule: "
                f"set lr_scheduler.name to polynomial, or leave power at 1"
            )


@dataclass
class BatchRampConfig:
    """Smaller batches at the beginning, when gradients agree more (Brown et al., arXiv 2005.14165, section 2.3)."""

    start: int | None = setting(
        None, "sequences of the first steps; null = train_batch_size from the first on", valid="[1, inf)"
    )
    tokens: int = setting(
        0, "tokens over which the batch grows to train_batch_size, by start at a time", valid="[0, inf)"
    )


@dataclass
class TrainConfig:
    """One training run."""

    data: str | None = setting(None, "directory written by fastroberta.prepare; null = the texts inside Python [data]")
    output_dir: str = setting("runs/roberta", "checkpoints and metrics; a run found there is continued [save_dir]")
    init_from: str | None = setting(None, "Hugging Face RoBERTa directory to start from; its sizes replace model.*")
    seed: int = setting(1, "of initial weights, data order, masks and dropout [seed]", valid=f"[0, {2**31})")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train; auto takes a GPU if there is one")
    precision: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16", "of the matrix products; master weights stay fp32; fp16 scales the loss [fp16, bf16]"
    )

    max_seq_length: int = setting(512, "tokens a sequence [tokens_per_sample]", valid="[8, inf)")
    packing: Literal["full-sentences", "doc-sentences", "contiguous"] = setting(
        "full-sentences",
        "whole sentences across documents, whole sentences of one document, or cut anywhere so that every sequence "
        "is full [sample_break_mode: complete, complete_doc, none]",
    )
    attention_scope: Literal["block", "document"] = setting(
        "block", "tokens attend to their whole sequence (RoBERTa), or only to their own document"
    )
    masking: Literal["dynamic", "static"] = setting("dynamic", "new masks every epoch, or (to compare) always the same")
    mlm_probability: float = setting(0.15, "share of tokens to predict [mask_prob]", valid="(0, 1)")

    train_batch_size: int = setting(
        8192, "sequences an optimizer step, over all devices [batch_size x update_freq x devices]", valid="[1, inf)"
    )
    micro_batch_size: int | Literal["auto"] = setting(
        "auto", "sequences a device holds at once; auto finds what fits [batch_size]", valid="[1, inf)"
    )
    sharding: Literal["none", "optimizer", "full"] = setting(
        "none",
        "what each of several devices keeps 1/N of: nothing; the optimizer's state; weights and gradients as well "
        "(FSDP2, for models that one device cannot hold) [zero_sharding]",
    )
    hang_timeout: float = setting(
        600.0,
        "seconds without progress after which several processes end, and say which held them up",
        valid="[5, inf)",
    )
    max_steps: int = setting(500_000, "optimizer steps of the whole run [max_update]", valid="[1, inf)")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward: less memory, about a third more time [checkpoint_activations]"
    )
    torch_compile: bool = setting(False, "compile the model with torch.compile")

    logging_steps: int = setting(50, "steps between two lines of metrics [log_interval]", valid="[1, inf)")
    eval_steps: int = setting(1000, "steps between two evaluations [validate_interval_updates]", valid="[1, inf)")
    eval_sequences: int = setting(1024, "held-out sequences an evaluation", valid="[1, inf)")
    save_steps: int = setting(1000, "steps between two checkpoints [save_interval_updates]", valid="[1, inf)")
    save_total_limit: int = setting(
        3, "newest checkpoints to keep; the best is kept as well [keep_interval_updates]", valid="[1, inf)"
    )
    tensorboard: bool = setting(True, "write TensorBoard files too, where it is installed [tensorboard_logdir]")
    dry_run: bool = setting(
        False, "resolve everything, print parameters, memory and expected time, do two small steps, leave nothing"
    )
    plan: bool = setting(False, "only predict memory, communication and scaling on a cluster: see --plan --help")

    batch_ramp: BatchRampConfig = dataclasses.field(default_factory=BatchRampConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = dataclasses.field(default_factory=LRSchedulerConfig)

    @property
    def smallest_batch_size(self) -> int:
        """Sequences of the first step; every step's are a multiple of it."""
        return self.batch_ramp.start or self.train_batch_size

    def check_processes(self, size: int) -> None:
        """Refuse a number of processes that cannot share every batch evenly."""
        batch = self.smallest_batch_size
        if batch % size:
            name = "train_batch_size" if self.batch_ramp.start is None else "batch_ramp.start"
            raise ConfigurationError(
                f"{name} = {batch} must be a multiple of the {size} processes, which share it evenly: take "
                f"{max(1, batch // size) * size}, for example"
            )
        if self.micro_batch_size != "auto" and batch % (size * self.micro_batch_size):
            raise ConfigurationError(
                f"micro_batch_size = {self.micro_batch_size} on {size} processes must divide the smallest batch, {batch}; "
                "lower it or set it to auto"
            )

    def check(self) -> None:
        """Refuse what no single field shows."""
        # With init_from the table is that of the checkpoint, which is not read yet.
        if self.init_from is None and self.max_seq_length + 2 > self.model.max_position_embeddings:
            raise ConfigurationError(
                f"max_seq_length = {self.max_seq_length} needs model.max_position_embeddings of at least "
                f"{self.max_seq_length + 2} (positions start at 2), which is {self.model.max_position_embeddings}: "
                f"lower max_seq_length to {self.model.max_position_embeddings - 2} or raise the other"
            )
        if round(self.mlm_probability * (self.max_seq_length - 2)) < 1:
            raise ConfigurationError(
                f"mlm_probability = {self.mlm_probability} masks no token in {self.max_seq_length}: raise it"
            )
        ramp = self.batch_ramp
        if (ramp.start is None) != (not ramp.tokens):
            raise ConfigurationError("batch_ramp.start and batch_ramp.tokens belong together: give both or neither")
        if ramp.start is not None and self.train_batch_size % ramp.start:
            raise ConfigurationError(
                f"batch_ramp.start = {ramp.start} must divide train_batch_size = {self.train_batch_size}, because batches "
                "grow by that many sequences at a time"
            )
        smallest = "train_batch_size" if ramp.start is None else "batch_ramp.start"
        if self.micro_batch_size != "auto" and self.smallest_batch_size % self.micro_batch_size:
            raise ConfigurationError(
                f"micro_batch_size = {self.micro_batch_size} must divide {smallest} = {self.smallest_batch_size}"
            )
        if self.sharding == "full" and self.torch_compile:
            raise ConfigurationError("sharding = full and torch_compile exclude each other: leave one of them")
        if self.lr_scheduler.warmup_steps > self.max_steps:
            raise ConfigurationError(
                f"lr_scheduler.warmup_steps = {self.lr_scheduler.warmup_steps} is more than max_steps = "
                f"{self.max_steps}: lower it too, for example --lr_scheduler.warmup_steps {self.max_steps // 10}"
            )
