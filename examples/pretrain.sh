#!/usr/bin/env bash
# Pretrain a small RoBERTa on your own text.
#
#   examples/pretrain.sh OUT TEXT...
#
# Writes OUT/data (shards and tokenizer), OUT/run (checkpoints and metrics) and OUT/model, which transformers loads. The
# same command continues an interrupted run. VOCABULARY sets the size of the vocabulary, TRAIN further training options:
#
#   TRAIN="--max_steps 2000" examples/pretrain.sh out corpus/*.jsonl.zst
set -euo pipefail
out=$1
shift

if [ ! -e "$out/data/manifest.json" ]; then
    python -m fastroberta.prepare "$@" --out "$out/data" --train-tokenizer "${VOCABULARY:-16000}"
fi
# shellcheck disable=SC2086  # TRAIN holds several words
python -m fastroberta.train --config "$(dirname "$0")/small.yaml" --data "$out/data" --output_dir "$out/run" ${TRAIN:-}
checkpoint=$(find "$out/run" -maxdepth 1 -name 'checkpoint-*' | sort | tail -1)
python -m fastroberta.evaluate "$checkpoint" --data "$out/data"
python -m fastroberta.export "$checkpoint" "$out/model"
