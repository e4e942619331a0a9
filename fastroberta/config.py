"""Settings of training: one dataclass for each part, and for each field the phrase that --help shows.

Names are Hugging Face's where it has one; fairseq's name stands in brackets. Later sources override earlier ones: the
defaults here, the presets or files named by --config, the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigurationError


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, valid: str | None = None, positional: bool = False
) -> Any:
    """A dataclass field with its phrase for --help; without a default, it is required.

    Args:
        valid: the interval that a number must lie in, as in mathematics: "[0, 1)". Every float has one, as NaN is in none.
        positional: given on the command line without a name. A positional list[str] comes last and takes all words left.
    """
    metadata = {"help": help, "valid": valid, "positional": positional}
    if isinstance(default, type):  # list: each instance needs its own
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The encoder. Fixed as in RoBERTa: exact GELU, one token type; special token ids are the tokenizer's."""

    vocab_size: int | None = setting(None, "vocabulary size; null: that of the data's tokenizer", valid="[6, inf)")
    hidden_size: int = setting(768, "width of the hidden states [encoder_embed_dim]", valid="[1, inf)")
    num_hidden_layers: int = setting(12, "number of encoder layers [encoder_layers]", valid="[1, inf)")
    num_attention_heads: int = setting(
        12, "number of attention heads per layer [encoder_attention_heads]", valid="[1, inf)"
    )
    intermediate_size: int = setting(3072, "width of the MLP's inner layer [encoder_ffn_embed_dim]", valid="[1, inf)")
    hidden_dropout_prob: float = setting(0.1, "dropout probability of the hidden states [dropout]", valid="[0, 1)")
    attention_probs_dropout_prob: float = setting(
        0.1, "dropout probability of the attention weights [attention_dropout]", valid="[0, 1)"
    )
    max_position_embeddings: int = setting(
        514, "rows of the position table: length of the longest sequence, plus 2 [max_positions + 2]", valid="[3, inf)"
    )
    layer_norm_eps: float = setting(1e-5, "constant added to the variance in LayerNorm", valid="(0, 1)")
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", valid="(0, inf)")

    def check(self) -> None:
        """Refuse settings that do not fit together."""
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
    """How gradients update the weights."""

    name: Literal["adamw", "lamb"] = setting("adamw", "update rule [optimizer]")
    learning_rate: float = setting(6e-4, "peak learning rate, reached at the end of the warm-up [lr]", valid="(0, inf)")
    betas: tuple[float, float] = setting(
        (0.9, 0.98), "decay rates of the running means of gradient and squared gradient [adam_betas]", valid="[0, 1)"
    )
    eps: float = setting(1e-6, "constant added to the square root of the second moment [adam_eps]", valid="(0, inf)")
    weight_decay: float = setting(0.01, "decoupled weight decay coefficient [weight_decay]", valid="[0, inf)")
    decay: Literal["all", "no_bias_norm"] = setting(
        "all",
        "parameters that weight decay applies to: all (fairseq), or all but biases and LayerNorm (BERT)",
    )
    max_grad_norm: float = setting(0.0, "largest global gradient norm; 0: no clipping [clip_norm]", valid="[0, inf)")


@dataclass
class LRSchedulerConfig:
    """The learning rate over the run: linear warm-up from 0, then decay to 0 at max_steps."""

    name: Literal["linear", "polynomial", "cosine", "constant"] = setting(
        "linear", "shape of the decay; constant: no decay [lr_scheduler]"
    )
    warmup_steps: int = setting(
        24_000, "number of steps until the peak rate is reached [warmup_updates]", valid="[0, inf)"
    )
    power: float = setting(1.0, "exponent of the polynomial decay [power]", valid="(0, inf)")

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        if self.power != 1 and self.name != "polynomial":
            raise ConfigurationError(
                f"lr_scheduler.power = {self.power} belongs to the polynomial schedule: "
                f"set lr_scheduler.name to polynomial, or leave power at 1"
            )


@dataclass
class BatchRampConfig:
    """Smaller batches early on, when gradients are less noisy (Brown et al., arXiv 2005.14165, section 2.3)."""

    start: int | None = setting(
        None, "batch size of the first steps; null: train_batch_size throughout", valid="[1, inf)"
    )
    tokens: int = setting(
        0, "number of tokens over which the batch grows to train_batch_size, by start at a time", valid="[0, inf)"
    )


@dataclass
class TrainConfig:
    """One training run."""

    data: str | None = setting(
        None,
        "directory written by fastroberta.prepare, or several with their weights: DIR,DIR:0.3; null: the texts inside "
        "Python [data]",
    )
    output_dir: str = setting("runs/roberta", "directory of the run, which is continued if found there [save_dir]")
    init_from: str | None = setting(None, "Hugging Face RoBERTa directory to start from; its sizes override model.*")
    seed: int = setting(1, "seed of the initial weights, data order, masks and dropout [seed]", valid=f"[0, {2**31})")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "precision of the matrix products; auto: what the device is fast in. Weights stay fp32, and fp16 scales the loss "
        "[fp16, bf16]",
    )

    max_seq_length: int = setting(512, "number of tokens per sequence [tokens_per_sample]", valid="[8, inf)")
    packing: Literal["full-sentences", "doc-sentences", "contiguous"] = setting(
        "full-sentences",
        "how sequences are filled: with whole sentences across documents, with whole sentences of one document, or cut "
        "anywhere so that each is full [sample_break_mode: complete, complete_doc, none]",
    )
    attention_scope: Literal["block", "document"] = setting(
        "block", "what a token attends to: its whole sequence (RoBERTa), or only its own document"
    )
    masking: Literal["dynamic", "static"] = setting("dynamic", "masks: new in every epoch, or always the same")
    mlm_probability: float = setting(0.15, "fraction of tokens to predict [mask_prob]", valid="(0, 1)")

    train_batch_size: int = setting(
        8192,
        "number of sequences per step, over all devices [batch_size x update_freq x devices]",
        valid="[1, inf)",
    )
    micro_batch_size: int | Literal["auto"] = setting(
        "auto",
        "number of sequences that a device processes at once; auto: as many as fit [batch_size]",
        valid="[1, inf)",
    )
    sharding: Literal["none", "optimizer", "full"] = setting(
        "none",
        "what is split among the devices: nothing, the optimizer's state, or also weights and gradients (FSDP2, for "
        "models that do not fit on one device) [zero_sharding]",
    )
    hang_timeout: float = setting(
        600.0,
        "seconds without progress after which a run of several processes ends, naming the one that hangs",
        valid="[5, inf)",
    )
    max_steps: int = setting(500_000, "number of optimizer steps in the whole run [max_update]", valid="[1, inf)")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, a third more time [checkpoint_activations]"
    )
    torch_compile: bool = setting(False, "compile the model with torch.compile")
    cuda_graph: bool = setting(
        False,
        "on a single GPU, replay steps as CUDA graphs, which spares small models and batches most of the host's time",
    )

    logging_steps: int = setting(50, "number of steps between log lines [log_interval]", valid="[1, inf)")
    eval_steps: int = setting(1000, "number of steps between evaluations [validate_interval_updates]", valid="[1, inf)")
    eval_sequences: int = setting(1024, "number of held-out sequences per evaluation", valid="[1, inf)")
    save_steps: int = setting(1000, "number of steps between checkpoints [save_interval_updates]", valid="[1, inf)")
    save_total_limit: int = setting(
        3, "number of latest checkpoints to keep, besides the best [keep_interval_updates]", valid="[1, inf)"
    )
    tensorboard: bool = setting(True, "also write TensorBoard files, if TensorBoard is installed [tensorboard_logdir]")
    dry_run: bool = setting(
        False, "print model size, memory and expected time, take two small steps, and leave no files behind"
    )

    batch_ramp: BatchRampConfig = dataclasses.field(default_factory=BatchRampConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = dataclasses.field(default_factory=LRSchedulerConfig)

    @property
    def smallest_batch_size(self) -> int:
        """Sequences in the first step; every later step has a multiple of it."""
        return self.batch_ramp.start or self.train_batch_size

    def check_processes(self, size: int) -> None:
        """Refuse a number of processes that cannot share every batch evenly."""
        batch = self.smallest_batch_size
        if batch % size:
            name = "train_batch_size" if self.batch_ramp.start is None else "batch_ramp.start"
            raise ConfigurationError(
                f"{name} = {batch} must be a multiple of the {size} processes, which share it evenly: use "
                f"{max(1, batch // size) * size}, for example"
            )
        if self.micro_batch_size != "auto" and batch % (size * self.micro_batch_size):
            raise ConfigurationError(
                f"micro_batch_size = {self.micro_batch_size} on {size} processes must divide the smallest batch, {batch}; "
                "lower it or set it to auto"
            )

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        # With init_from, the position table is the checkpoint's, which has not been read yet.
        if self.init_from is None and self.max_seq_length + 2 > self.model.max_position_embeddings:
            raise ConfigurationError(
                f"max_seq_length = {self.max_seq_length} needs model.max_position_embeddings of at least "
                f"{self.max_seq_length + 2} (positions start at 2), not {self.model.max_position_embeddings}: "
                f"lower max_seq_length to {self.model.max_position_embeddings - 2}, or raise the other"
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
                f"batch_ramp.start = {ramp.start} must divide train_batch_size = {self.train_batch_size}, because the "
                "batch grows by that many sequences at a time"
            )
        smallest = "train_batch_size" if ramp.start is None else "batch_ramp.start"
        if self.micro_batch_size != "auto" and self.smallest_batch_size % self.micro_batch_size:
            raise ConfigurationError(
                f"micro_batch_size = {self.micro_batch_size} must divide {smallest} = {self.smallest_batch_size}"
            )
        if self.sharding == "full" and self.torch_compile:
            raise ConfigurationError("sharding = full and torch_compile cannot be combined: leave one out")
        if self.cuda_graph and self.torch_compile:
            raise ConfigurationError("cuda_graph and torch_compile cannot be combined: leave one out")
        if self.lr_scheduler.warmup_steps > self.max_steps:
            raise ConfigurationError(
                f"lr_scheduler.warmup_steps = {self.lr_scheduler.warmup_steps} is more than max_steps = "
                f"{self.max_steps}: lower it too, for example --lr_scheduler.warmup_steps {self.max_steps // 10}"
            )


@dataclass
class ClusterConfig:
    """The machines that a run is planned for; bandwidths are those reached, not those of data sheets."""

    nodes: int = setting(1, "number of machines", valid="[1, inf)")
    gpus: int = setting(8, "number of GPUs per machine", valid="[1, inf)")
    gpu_name: str = setting("H200", "GPU, named as PyTorch names it; decides the peak FLOP/s")
    gpu_memory: float | None = setting(
        None, "memory per GPU in GiB, a tenth of which stays free; null: that of gpu_name", valid="(0, inf)"
    )
    gpu_bandwidth: float | None = setting(
        None, "memory bandwidth of a GPU in TB/s; null: 5/6 of gpu_name's peak", valid="(0, inf)"
    )
    mfu: float = setting(
        0.4,
        "fraction of the peak FLOP/s that forward and backward passes reach; measure it for your run",
        valid="(0, 1]",
    )
    node_bandwidth: float | None = setting(
        None, "bandwidth in GB/s from a GPU to the next in its machine; null: 80% of gpu_name's link", valid="(0, inf)"
    )
    network_bandwidth: float = setting(
        40.0, "bandwidth in GB/s per GPU to other machines; 40 is 80% of a 400 Gbit/s card per GPU", valid="(0, inf)"
    )
