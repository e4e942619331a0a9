"""A model as one ONNX file that onnxruntime loads alone; checked against PyTorch, and quantized to int8 if asked to."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..corpus.tokenizer import save_tokenizer, special_token_ids
from ..errors import CheckpointError, ConfigurationError
from ..hf import longest_sequence
from .heads import HEADS, load_with_head
from .texts import read_texts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

MODEL, REPORT = "model.onnx", "onnx.json"
TOLERANCE = 1e-4  # of each output, absolute, and relative beyond 1
LARGEST = 2_000_000_000  # bytes of weights in one file: protobuf ends at 2 GiB


def export_onnx(checkpoint: Path, out: Path, quantize: bool, file: str | None) -> dict[str, Any]:
    """Write `model.onnx`, its `config.json`, its tokenizer and `onnx.json`, the report that is returned.

    Inputs are `input_ids` and `attention_mask` (1: token, 0: padding), int64, of shape (batch, length), or
    (batch, choices, length) for multiple choice; every axis is dynamic. Outputs are fp32: `logits`, or `start_logits` and
    `end_logits`.

    Args:
        out: directory, made if need be. quantize: store weights as int8 and quantize activations as they come.
        file: held-out data, on which what int8 changes is measured: texts, one per line, for a masked LM; otherwise
            labelled examples in any format of fine-tuning.
    Raises:
        CheckpointError: not a model that can be exported, or onnxruntime computes something else than PyTorch.
        ConfigurationError: a package is missing. DataError: the held-out data cannot be used.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx needs

        from .onnx_heldout import compare_examples, compare_masks, read_held_out  # needs scikit-learn and seqeval
    except ImportError as error:
        raise ConfigurationError(f"format = onnx: needs {error.name}; pip install 'fastroberta[onnx]'") from error

    model, head, tokenizer = load_with_head(checkpoint, heads=list(HEADS), extra="onnx")
    if sum(parameter.nbytes for parameter in model.parameters()) > LARGEST:
        raise CheckpointError(
            f"{checkpoint}: more than 2 GB of weights do not fit in one ONNX file; take a smaller model"
        )
    longest = longest_sequence(model.config.max_position_embeddings, model.config.pad_token_id)
    texts = read_texts([], file) if file and head == "MaskedLM" else []
    held_out = read_held_out(Path(file), checkpoint, model, head, tokenizer) if file and not texts else None
    tokenizer.enable_truncation(longest)
    out.mkdir(parents=True, exist_ok=True)
    _trace(model, _make_batch(model, head, 2, min(longest, 8)), out / MODEL)

    session = onnxruntime.InferenceSession(out / MODEL, providers=["CPUExecutionProvider"])
    shapes = [(1, min(longest, 5)), (3, min(longest, 64))]  # neither is the traced one, in any axis
    difference = max(_check(session, model, _make_batch(model, head, *shape), checkpoint) for shape in shapes)
    report: dict[str, Any] = {
        "head": head,
        "inputs": [one.name for one in session.get_inputs()],
        "outputs": [one.name for one in session.get_outputs()],
        "checked_shapes": shapes,
        "largest_difference": difference,
        "quantize": "int8" if quantize else "none",
        "bytes": {"fp32": (out / MODEL).stat().st_size},
    }
    if quantize:
        before = out / "fp32.onnx"
        (out / MODEL).rename(before)
        _quantize(before, out / MODEL)
        before.unlink()
        sessions = {
            "fp32": session,
            "int8": onnxruntime.InferenceSession(out / MODEL, providers=["CPUExecutionProvider"]),
        }
        report["bytes"]["int8"] = (out / MODEL).stat().st_size
        report["tokens_per_second"] = _measure_speed(sessions, _make_batch(model, head, 8, min(longest, 128)))
        special = special_token_ids(tokenizer)
        if texts:
            sequences = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
            report["held_out"] = compare_masks(sessions, sequences, special)
        elif held_out:
            report["held_out"] = compare_examples(sessions, report["outputs"], held_out, special.pad)
    model.config.save_pretrained(out)
    save_tokenizer(tokenizer, out, model_max_length=longest)
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def describe_report(report: dict[str, Any]) -> str:
    """The report in lines for a person."""
    size, shapes = report["bytes"], " and ".join(f"{b} x {length}" for b, length in report["checked_shapes"])
    lines = [
        f"{HEADS[report['head']]}, {', '.join(report['inputs'])} -> {', '.join(report['outputs'])}; "
        f"within {report['largest_difference']:.1e} of PyTorch at {shapes} tokens",
    ]
    if report["quantize"] == "int8":
        speed = report["tokens_per_second"]
        lines += [
            f"size: {size['fp32'] / 1e6:,.2f} MB in fp32, {size['int8'] / 1e6:,.2f} MB in int8",
            f"speed: {speed['fp32']:,.0f} tokens/s in fp32, {speed['int8']:,.0f} in int8",
        ]
        if held_out := report.get("held_out"):
            what = "masked tokens" if report["head"] == "MaskedLM" else "examples"
            parts = [f"held out, {held_out['examples']:,} {what}"]
            if scores := held_out.get("scores"):
                metric = held_out["metric"]
                parts.append(f"{metric} {scores['fp32'][metric]:.4f} in fp32, {scores['int8'][metric]:.4f} in int8")
            if "agreement" in held_out:
                parts.append(f"the same prediction for {held_out['agreement']:.2%}")
            lines.append("; ".join(parts))
        else:
            lines.append("held out: not measured; give --file")
    else:
        lines.append(f"size: {size['fp32'] / 1e6:,.2f} MB")
    return "\n".join(lines)


def _make_batch(model: PreTrainedModel, head: str, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens; the last row ends in padding, so that the mask matters."""
    shape = (batch, 2 + batch % 2, length) if head == "MultipleChoice" else (batch, length)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    input_ids[input_ids == model.config.pad_token_id] = (model.config.pad_token_id + 1) % model.config.vocab_size
    attention_mask = torch.ones_like(input_ids)
    if batch > 1:
        input_ids[-1, ..., length // 2 :] = model.config.pad_token_id
        attention_mask[-1, ..., length // 2 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _trace(model: PreTrainedModel, batch: dict[str, Tensor], path: Path) -> None:
    axes = ("batch", "length") if batch["input_ids"].ndim == 2 else ("batch", "choices", "length")
    with torch.no_grad():
        outputs = list(model(**batch))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=batch,
            input_names=list(batch),
            output_names=outputs,
            dynamic_shapes={name: dict(enumerate(axes)) for name in batch},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def _check(session: InferenceSession, model: PreTrainedModel, batch: dict[str, Tensor], checkpoint: Path) -> float:
    """The largest absolute difference between an output of onnxruntime and of PyTorch."""
    expected = model(**batch)
    names = [one.name for one in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
    differences = [np.abs(output - expected[name].numpy()) for name, output in zip(names, found)]
    for name, difference in zip(names, differences):
        if not (difference <= TOLERANCE * np.maximum(1, np.abs(expected[name].numpy()))).all():
            raise CheckpointError(
                f"{checkpoint}: in onnxruntime, {name} differs by {difference.max():.1e} from PyTorch, {TOLERANCE:.0e} is "
                "allowed; try other versions of torch and onnxruntime"
            )
    return max(float(difference.max()) for difference in differences)


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a step for convolutions
    try:
        # 7 bits: a CPU without VNNI adds pairs of 8-bit products in 16 bits, which overflow.
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        logging.root.setLevel(before)


def _measure_speed(sessions: dict[str, InferenceSession], batch: dict[str, Tensor]) -> dict[str, float]:
    """Tokens per second, padding included: median of 5 rounds in which the sessions take turns, after one to warm up."""
    inputs = {name: tensor.numpy() for name, tensor in batch.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(6):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, inputs)
            seconds[name].append(time.perf_counter() - started)
    return {name: batch["input_ids"].numel() / float(np.median(times[1:])) for name, times in seconds.items()}
