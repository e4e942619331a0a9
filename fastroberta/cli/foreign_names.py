"""Names that users bring to training from fairseq, transformers and our own planner: what each is called here.

Each text completes "NAME ...". A name is looked up by its last part, and only if we have no setting of that name.
"""

from __future__ import annotations

_STEP = "has no counterpart: it follows from micro_batch_size and train_batch_size, the sequences of a whole step, "
_PREPARE = "has no counterpart: prepare the text with python -m fastroberta.prepare, and give its directory as data"
_RESUME = "is not needed: a run found in output_dir continues by itself"
_TENSORBOARD = "is report_to: tensorboard here; the files go to output_dir"
_EXPORT = "has no counterpart: write the model with python -m fastroberta.export, then upload that directory"

FAIRSEQ_NAMES = {
    "activation_dropout": "has no counterpart: RoBERTa has no dropout inside the MLP",
    "adam_betas": "is optimizer.betas here, a list: [0.9, 0.98]",
    "adam_eps": "is optimizer.eps here",
    "arch": "is --config here, with a preset: distilroberta, roberta-base or roberta-large",
    "attention_dropout": "is model.attention_probs_dropout_prob here",
    "batch_size": "is micro_batch_size here; train_batch_size = batch_size x update_freq x number of devices",
    "checkpoint_activations": "is gradient_checkpointing here",
    "clip_norm": "is optimizer.max_grad_norm here; 0 switches clipping off in both",
    "cpu": "is device: cpu here",
    "dropout": "is model.hidden_dropout_prob here",
    "encoder_attention_heads": "is model.num_attention_heads here",
    "encoder_embed_dim": "is model.hidden_size here",
    "encoder_ffn_embed_dim": "is model.intermediate_size here",
    "encoder_layers": "is model.num_hidden_layers here",
    "keep_interval_updates": "is save_total_limit here",
    "keep_last_epochs": "is save_total_limit here, counted in checkpoints",
    "leave_unmasked_prob": "is fixed here at 0.1, as in the paper",
    "log_interval": "is logging_steps here",
    "lr": "is optimizer.learning_rate here, a single number",
    "mask_prob": "is mlm_probability here",
    "mask_whole_words": "has no counterpart: RoBERTa masks single tokens",
    "max_epoch": "is num_train_epochs here",
    "max_positions": "is model.max_position_embeddings here, two more than fairseq's number",
    "max_sentences": "is micro_batch_size here; train_batch_size = max_sentences x update_freq x number of devices",
    "max_source_positions": "is model.max_position_embeddings here, two more than fairseq's number",
    "max_tokens": "has no counterpart: set micro_batch_size = max_tokens / max_seq_length",
    "max_update": "is max_steps here",
    "memory_efficient_fp16": "is precision: fp16 here",
    "min_lr": "has no counterpart: the schedules end at 0",
    "no_progress_bar": "is not needed: without a terminal, progress is plain lines",
    "peak_lr": "is optimizer.learning_rate here",
    "random_token_prob": "is fixed here at 0.1, as in the paper",
    "restore_file": "is init_from here, a Hugging Face directory; a run found in output_dir continues by itself",
    "sample_break_mode": "is packing here: complete -> full-sentences, complete_doc -> doc-sentences, "
    "none -> contiguous",
    "save_dir": "is output_dir here",
    "save_interval_updates": "is save_steps here",
    "shorten_method": "has no counterpart: a sentence longer than max_seq_length is split, and nothing is lost",
    "skip_invalid_size_inputs_valid_test": "has no counterpart: a long sentence is split, and nothing is skipped",
    "tensorboard_logdir": _TENSORBOARD,
    "tokens_per_sample": "is max_seq_length here",
    "total_num_update": "is max_steps here: the decay ends with the run",
    "update_freq": _STEP + "which is batch_size x update_freq x number of devices",
    "validate_interval_updates": "is eval_steps here",
    "wandb_project": "is report_to: wandb here; the project is fastroberta, or as the environment says",
    "warmup_updates": "is lr_scheduler.warmup_steps here",
}

# Names that end as ours do (weight_decay, warmup_ratio, max_grad_norm) need no hint: the most similar name is the right one.
HUGGING_FACE_NAMES = {
    "adam_beta1": "is the first number of optimizer.betas here, a list: [0.9, 0.98]",
    "adam_beta2": "is the second number of optimizer.betas here, a list: [0.9, 0.98]",
    "adam_epsilon": "is optimizer.eps here",
    "auto_find_batch_size": "is micro_batch_size: auto here",
    "bf16": "is precision: bf16 here",
    "config_name": "is --config here, with a preset, or single settings such as model.hidden_size",
    "data_seed": "is seed here, which also decides weights, masks and dropout",
    "dataloader_num_workers": "is not needed: batches are read ahead from files in memory",
    "dataset_name": _PREPARE,
    "ddp_timeout": "is hang_timeout here, in seconds",
    "deepspeed": "is sharding here: optimizer splits what ZeRO-1 does, full what ZeRO-3 does",
    "disable_tqdm": "is not needed: without a terminal, progress is plain lines",
    "do_eval": "is not needed: training evaluates every eval_steps",
    "do_train": "is not needed: this program trains",
    "eval_strategy": "is not needed: training evaluates every eval_steps",
    "evaluation_strategy": "is not needed: training evaluates every eval_steps",
    "fp16": "is precision: fp16 here",
    "fsdp": "is sharding: full here",
    "gradient_accumulation_steps": _STEP
    + "which is per_device_train_batch_size x gradient_accumulation_steps x number of devices",
    "hub_model_id": _EXPORT,
    "line_by_line": "is packing here: doc-sentences never puts two documents into one sequence",
    "load_best_model_at_end": "is not needed: the best checkpoint is always kept",
    "logging_dir": _TENSORBOARD,
    "logging_strategy": "is not needed: metrics are logged every logging_steps",
    "lr_scheduler_type": "is lr_scheduler.name here: linear, polynomial, cosine or constant",
    "model_name_or_path": "is init_from here, a local Hugging Face directory; for an untrained model use --config with "
    "a preset",
    "no_cuda": "is device: cpu here",
    "optim": "is optimizer.name here: adamw or lamb",
    "overwrite_output_dir": _RESUME + "; to start afresh, give another output_dir",
    "per_device_eval_batch_size": "is micro_batch_size here, for training and evaluation",
    "per_device_train_batch_size": "is micro_batch_size here; train_batch_size = per_device_train_batch_size x "
    "gradient_accumulation_steps x number of devices",
    "push_to_hub": _EXPORT,
    "resume_from_checkpoint": _RESUME
    + "; to start a new run from a model, give init_from; to continue a checkpoint with "
    "other settings, give resume_from",
    "run_name": "is the last part of output_dir here",
    "save_strategy": "is not needed: checkpoints are written every save_steps",
    "tokenizer_name": "is tokenizer in python -m fastroberta.prepare; training takes the tokenizer of its data",
    "train_file": _PREPARE,
    "use_cpu": "is device: cpu here",
    "validation_file": "has no counterpart: python -m fastroberta.prepare holds documents out, by heldout_fraction",
}

# What people type from memory, where the most similar of our names would mislead.
COMMON_NAMES = {
    "epochs": "is num_train_epochs here",
    "gradient_clipping": "is optimizer.max_grad_norm here",
    "layers": "is model.num_hidden_layers here",
    "mlm": "is mlm_probability here",
    "num_workers": "is not needed: batches are read ahead from files in memory",
    "steps": "is max_steps here",
    "tensorboard": _TENSORBOARD,
    "tokenizer": "belongs to python -m fastroberta.prepare; training takes the tokenizer of its data",
}

_PLAN = "belongs to python -m fastroberta.plan, which predicts a run and does not train"
HINTS = FAIRSEQ_NAMES | HUGGING_FACE_NAMES | COMMON_NAMES
CLUSTER_NAMES = (
    "nodes", "gpus", "gpu_name", "gpu_memory", "gpu_bandwidth", "mfu", "node_bandwidth", "network_bandwidth",
)  # fmt: skip
HINTS |= dict.fromkeys(["plan", *CLUSTER_NAMES], _PLAN)
