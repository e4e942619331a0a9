#!/usr/bin/env bash
# Fine-tune a model on SST-2, export it to ONNX in int8, and classify with onnxruntime alone.
#
#   examples/finetune.sh MODEL GLUE OUT
#
# GLUE is the directory of GLUE's files, or of SST-2's. FINETUNE may hold further options of fine-tuning.
set -euo pipefail
model=$1
glue=$2
out=$3

# shellcheck disable=SC2086  # FINETUNE holds several words
python -m fastroberta.finetune "$model" --task sst-2 --data "$glue" --out "$out/sst-2" ${FINETUNE:-}
python -m fastroberta.export "$out/sst-2/model" "$out/onnx" --format onnx --quantize int8
python "$(dirname "$0")/classify.py" "$out/onnx" "A film that never bores." "A dull, endless evening."
