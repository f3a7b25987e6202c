#!/bin/sh
# How the built-in model, storyteller, was made: every command, in order.
#
#   sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR
#
# STORIES is the corpus of public-domain children's books (fields title, section, author, gutenberg_id, text), which
# recipes/fetch_stories.py rebuilds. WORK_DIR gets the tokenizer, the packed shards and the run. Stop it whenever you
# like and start it again: packing and training go on where they were. LLMCTL names the program (default: llmctl);
# STEPS and THREADS change the length of the training and the number of CPU threads.
set -eu

stories=${1:?usage: sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR}
work=${2:?usage: sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR}
llmctl=${LLMCTL:-llmctl}
steps=${STEPS:-2000}
mkdir -p "$work"

[ -d "$work/tokenizer" ] || $llmctl tokenize train "$stories" --field text --vocab-size 4096 \
  --special-token "<|im_start|>" --special-token "<|im_end|>" --out-dir "$work/tokenizer"

$llmctl tokenize pack "$stories" --field text --tokenizer "$work/tokenizer" --val-fraction 0.01 --out-dir "$work/shards"

$llmctl pretrain --data "$work/shards" --out-dir "$work/run" --auto-resume \
  --depth 4 --seq-len 512 --batch-size 16 --max-steps "$steps" --schedule wsd --decay-fraction 0.3 \
  --sample-prompt "Once upon a time" --sample-tokens 100 --eval-every 200 --save-every 50 \
  ${THREADS:+--threads "$THREADS"}

# What ships is the last checkpoint in bfloat16. Its card was written by hand from the numbers that the run printed, and
# generation_config.json got temperature 0.7, top_p 0.9 and repetition_penalty 1.1.
[ -d "$work/storyteller" ] || $llmctl export "$(ls -d "$work"/run/step-* | tail -n 1)" --dtype bf16 --output "$work/storyteller"
