"""Settings of training: one dataclass for each part, and for each field the phrase that --help shows.

Names are Hugging Face's where it has one; fairseq's name follows in brackets. Later sources override earlier ones: the
defaults here, the presets or files named by --config, the command line.

The defaults suit a first run on your own text and one GPU: a model of roberta-base's size, and 10,000 steps of 256
sequences, a third of a per cent of the paper's training. The paper's own numbers are in presets/roberta-base.yaml.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigurationError


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    valid: str | None = None,
    positional: bool = False,
    path: Literal["model", "data", "output"] | None = None,
    replaces: str | None = None,
) -> Any:
    """A dataclass field with its phrase for --help; without a default, it is required. A default of None admits null.

    Args:
        valid: the interval that a number must lie in, as in mathematics: "[0, 1)". Every float has one, because NaN lies
            in none.
        positional: given on the command line without a name. A positional list[str] comes last and takes all remaining
            words.
        path: what the local path leads to, for settings that hold one; names of remote places are refused.
        replaces: a setting of the same class that says the same thing in another unit and would take precedence. It is
            set to null when this one is given later.
    """
    metadata = {"help": help, "valid": valid, "positional": positional, "path": path, "replaces": replaces}
    if isinstance(default, type):  # list: each instance needs its own
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The encoder. Special token ids come from the tokenizer."""

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
    # Once TrainConfig has filled it in, an int.
    max_position_embeddings: int = setting(
        None,
        "rows of the position table, two more than the longest sequence has tokens; null: max_seq_length + 2 "
        "[max_positions + 2]",
        valid="[3, inf)",
    )
    layer_norm_eps: float = setting(1e-5, "constant added to the variance in LayerNorm", valid="(0, 1)")
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", valid="(0, inf)")
    hidden_act: Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"] = setting(
        "gelu", "activation in the layers: exact GELU, or its tanh approximation, which has three names"
    )
    type_vocab_size: int = setting(
        1, "rows of the token-type table, of which pretraining uses the first", valid="[1, inf)"
    )
    tie_word_embeddings: bool = setting(True, "let the head predict with the word embeddings, not a matrix of its own")
    model_type: Literal["roberta", "xlm-roberta", "camembert", "data2vec-text"] = setting(
        "roberta", "name of the architecture, which is always the same, in the checkpoints"
    )

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
    learning_rate: float = setting(
        2.5e-4, "peak learning rate, reached at the end of the warm-up [lr]", valid="(0, inf)"
    )
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
    warmup_ratio: float | None = setting(
        0.06, "fraction of all steps spent on warm-up", valid="[0, 1]", replaces="warmup_steps"
    )
    # Once TrainConfig.settle_steps has filled it in, an int.
    warmup_steps: int = setting(
        None, "number of warm-up steps; null: as warmup_ratio says [warmup_updates]", valid="[0, inf)"
    )
    power: float = setting(1.0, "exponent of the polynomial decay [power]", valid="(0, inf)")

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        if self.power != 1 and self.name != "polynomial":
            raise ConfigurationError(
                f"lr_scheduler.power = {self.power} belongs to the polynomial schedule: "
                "set lr_scheduler.name to polynomial, or leave power at 1"
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
class DistillationConfig:
    """What a student learns from the teacher of distill_from; names and values are DistilBERT's (arXiv 1910.01108)."""

    temperature: float = setting(
        2.0, "divisor of both models' logits in the soft targets, which flattens them", valid="(0, inf)"
    )
    alpha_ce: float = setting(
        5.0,
        "weight of the soft targets: the divergence of the student's predictions from the teacher's",
        valid="[0, inf)",
    )
    alpha_mlm: float = setting(2.0, "weight of masked language modelling", valid="[0, inf)")
    alpha_cos: float = setting(
        1.0, "weight of the cosine distance between the last hidden states of both models", valid="[0, inf)"
    )
    teacher_layers = 0  # no setting: what distill_from turns out to have

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        if not self.alpha_ce + self.alpha_mlm + self.alpha_cos:
            raise ConfigurationError(
                "distillation.alpha_ce, alpha_mlm and alpha_cos are all 0, so nothing would be learned: raise one"
            )


@dataclass
class TrainConfig:
    """One training run."""

    data: list[str] | None = setting(
        None,
        "directory written by fastroberta.prepare; several with their weights: --data DIR --data DIR:0.3; null: the "
        "documentation that comes with Python [data]",
        path="data",
    )
    output_dir: str = setting(
        "runs/roberta",
        "directory to write to; a run found there is continued [save_dir]",
        path="output",
    )
    init_from: str | None = setting(
        None,
        "Hugging Face directory to start from (RoBERTa, XLM-R, CamemBERT, BERT); its sizes override model.*",
        path="model",
    )
    distill_from: str | None = setting(
        None,
        "directory of a RoBERTa with more layers, the teacher: the student starts from its layers and learns from it",
        path="model",
    )
    resize_vocabulary: bool = setting(
        False,
        "fit the vocabulary of init_from to the tokenizer of the data: known tokens keep their embeddings, a new one gets "
        "the mean of its parts",
    )
    resume_from: str | None = setting(
        None,
        "checkpoint of another run to continue in a new output_dir, with its optimizer's state and place in the data; "
        "optimizer, schedule, batch and max_steps may differ",
        path="model",
    )
    seed: int = setting(1, "seed of the initial weights, data order, masks and dropout [seed]", valid=f"[0, {2**31})")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = setting(
        "auto",
        "precision of matrix products; auto: the one that the device is fastest in, never fp8. Weights stay fp32; fp16 "
        "scales the loss; fp8 is bf16 with 8-bit factors in the layers [fp16, bf16]",
    )

    max_seq_length: int = setting(512, "number of tokens per sequence [tokens_per_sample]", valid="[8, inf)")
    packing: Literal["full-sentences", "doc-sentences", "contiguous"] = setting(
        "full-sentences",
        "how sequences are filled: with whole sentences across documents, with whole sentences of one document, or with "
        "text cut anywhere so that each is full [sample_break_mode: complete, complete_doc, none]",
    )
    attention_scope: Literal["block", "document"] = setting(
        "block", "what a token attends to: its whole sequence, as in RoBERTa, or its own document only"
    )
    masking: Literal["dynamic", "static"] = setting(
        "dynamic", "whether masks are drawn again in every epoch, or stay the same"
    )
    mlm_probability: float = setting(0.15, "fraction of tokens to predict [mask_prob]", valid="(0, 1)")

    train_batch_size: int = setting(
        256,
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
        "what is split among the devices: nothing, the optimizer's state, or weights and gradients as well (FSDP2, for "
        "models that do not fit on one device) [zero_sharding]",
    )
    cpu_offload: bool = setting(
        False,
        "keep weights, gradients and optimizer state in host memory and update them there: slow, only for sharding: full",
    )
    hang_timeout: float = setting(
        600.0,
        "seconds without progress after which a run of several processes ends and names the one that hangs",
        valid="[5, inf)",
    )
    max_steps: int = setting(
        10_000,
        "number of optimizer steps in the whole run [max_update]",
        valid="[1, inf)",
        replaces="num_train_epochs",
    )
    num_train_epochs: float | None = setting(
        None,
        "number of passes over the training data, which sets max_steps; of the two, the one given last counts [max_epoch]",
        valid="(0, inf)",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, a third more time [checkpoint_activations]"
    )
    torch_compile: bool = setting(False, "compile the model with torch.compile")
    cuda_graph: bool = setting(
        True,
        "on a single GPU, record a micro-batch and the update as CUDA graphs during the first steps and replay them, which "
        "spares the host most of its work; if a replay is not the same to the bit, one line says so and nothing is replayed",
    )

    logging_steps: int = setting(50, "number of steps between log lines [log_interval]", valid="[1, inf)")
    eval_steps: int = setting(1000, "number of steps between evaluations [validate_interval_updates]", valid="[1, inf)")
    eval_sequences: int = setting(1024, "number of held-out sequences per evaluation", valid="[1, inf)")
    save_steps: int = setting(1000, "number of steps between checkpoints [save_interval_updates]", valid="[1, inf)")
    save_total_limit: int = setting(
        3, "number of latest checkpoints to keep, besides the best [keep_interval_updates]", valid="[1, inf)"
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = setting(
        list, "where metrics go besides metrics.jsonl in output_dir [tensorboard_logdir, wandb_project]"
    )
    profile: int = setting(
        0,
        "number of steps to profile once the first three are done; writes a Chrome trace and a table of the ten most "
        "expensive operations to output_dir/profile",
        valid="[0, inf)",
    )
    dry_run: bool = setting(
        False, "print model size, memory and expected time, take two small steps, and leave no files behind"
    )

    batch_ramp: BatchRampConfig = dataclasses.field(default_factory=BatchRampConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = dataclasses.field(default_factory=LRSchedulerConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        # What init_from has is known when it is read; more than that is used only if asked for.
        if self.model.max_position_embeddings is None and self.init_from is None:
            self.model = dataclasses.replace(self.model, max_position_embeddings=self.max_seq_length + 2)
        if self.num_train_epochs is None:
            self.settle_steps(self.max_steps)

    def settle_steps(self, max_steps: int) -> None:
        """Set the number of steps, once it is known, and express the warm-up in steps.

        Of what says the same in other units nothing is left: a continued run is compared by its numbers of steps.
        """
        schedule = self.lr_scheduler
        warmup = round((schedule.warmup_ratio or 0.0) * max_steps)
        self.max_steps, self.num_train_epochs = max_steps, None
        self.lr_scheduler = dataclasses.replace(
            schedule,
            warmup_steps=warmup if schedule.warmup_steps is None else schedule.warmup_steps,
            warmup_ratio=None,
        )

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
        if self.resume_from is not None and self.num_train_epochs is not None:
            raise ConfigurationError("num_train_epochs and resume_from cannot be combined: give max_steps")
        # With either of these, the position table is the checkpoint's, which has not been read yet.
        is_new = self.init_from is None and self.resume_from is None
        if is_new and self.max_seq_length + 2 > self.model.max_position_embeddings:
            raise ConfigurationError(
                f"max_seq_length = {self.max_seq_length} needs model.max_position_embeddings of at least "
                f"{self.max_seq_length + 2} (positions start at 2), not {self.model.max_position_embeddings}: "
                f"lower max_seq_length to {self.model.max_position_embeddings - 2}, or raise the other"
            )
        if round(self.mlm_probability * (self.max_seq_length - 2)) < 1:
            raise ConfigurationError(
                f"mlm_probability = {self.mlm_probability} is less than one token in {self.max_seq_length}: raise it"
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
        if self.cpu_offload and self.sharding != "full":
            raise ConfigurationError(f"cpu_offload needs sharding = full, not {self.sharding}: set both, or neither")
        if self.sharding == "full" and self.torch_compile:
            raise ConfigurationError("sharding = full and torch_compile cannot be combined: leave one out")
        sizes = self.model.hidden_size, self.model.intermediate_size
        if self.precision == "fp8" and any(size % 16 for size in sizes):
            raise ConfigurationError(
                f"precision = fp8 needs multiples of 16 in model.hidden_size and model.intermediate_size, not {sizes}"
            )
        if self.resize_vocabulary and self.init_from is None:
            raise ConfigurationError("resize_vocabulary fits the model of init_from: give --init_from too")
        if self.distill_from is None and self.distillation != DistillationConfig():
            raise ConfigurationError("distillation settings need a teacher: give --distill_from DIRECTORY")
        if self.sharding == "full" and self.distill_from is not None:
            raise ConfigurationError("sharding = full and distill_from cannot be combined: set sharding to optimizer")
        # With epochs, the number of steps is not known before the data.
        if self.num_train_epochs is None and self.lr_scheduler.warmup_steps > self.max_steps:
            raise ConfigurationError(
                f"lr_scheduler.warmup_steps = {self.lr_scheduler.warmup_steps} is more than max_steps = "
                f"{self.max_steps}: lower it too, for example --lr_scheduler.warmup_steps {self.max_steps // 10}"
            )
