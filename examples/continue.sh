#!/usr/bin/env bash
# Train a published model further on your own text, and score it before and after.
#
#   examples/continue.sh MODEL OUT TEXT...
#
# MODEL is a directory, for example the one that `hf download FacebookAI/roberta-base --local-dir roberta-base` writes. TRAIN
# may hold further training options.
set -euo pipefail
model=$1
out=$2
shift 2

if [ ! -e "$out/data/manifest.json" ]; then
    python -m fastroberta.prepare "$@" --out "$out/data" --tokenizer "$model"
fi
# A tenth of the learning rate of pretraining, so that the model learns the new text without forgetting the old.
# shellcheck disable=SC2086  # TRAIN holds several words
python -m fastroberta.train --init_from "$model" --data "$out/data" --output_dir "$out/run" \
    --train_batch_size 256 --max_steps 2000 --optimizer.learning_rate 6e-5 --lr_scheduler.warmup_steps 100 ${TRAIN:-}
checkpoint=$(find "$out/run" -maxdepth 1 -name 'checkpoint-*' | sort | tail -1)
for one in "$model" "$checkpoint"; do
    python -m fastroberta.evaluate "$one" --data "$out/data"
done
python -m fastroberta.export "$checkpoint" "$out/model"
