"""`python -m fastroberta`: which programs there are."""

from __future__ import annotations

import sys

PROGRAMS = {
    "prepare": "turn text into token shards for training",
    "train": "pretrain RoBERTa on shards; without arguments, on a small example",
    "plan": "predict memory, communication and speed of a run on a cluster",
    "evaluate": "compute held-out loss, perplexity and accuracy of a checkpoint",
    "export": "write a checkpoint for transformers or onnxruntime",
    "fill_mask": "predict masked words in texts, or serve a page to try a model",
    "embed": "turn texts into vectors",
    "finetune": "fine-tune a checkpoint on GLUE, SQuAD, RACE, or your own labels",
    "ablate": "repeat the RoBERTa paper's experiments at your own scale",
    "explain": "show which tokens a prediction rests on, and where heads attend",
    "torchrun": "start train on several GPUs or machines, as torchrun does",
}


def main() -> int:
    lines = [f"  python -m fastroberta.{name:10} {text}" for name, text in PROGRAMS.items()]
    print("fastroberta pretrains RoBERTa with its own kernels. Its programs:\n", *lines, sep="\n")
    print("\n--help lists the settings of each. For a first example, run python -m fastroberta.train")
    unknown = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    if unknown:
        print(f"error: {unknown[0]}: unexpected argument; run python -m fastroberta.PROGRAM", file=sys.stderr)
    return 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
