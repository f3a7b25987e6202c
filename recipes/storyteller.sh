#!/bin/sh
# How the built-in model, storyteller, was made: every command, in order.
#
#   sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR
#
# STORIES is the corpus of public-domain children's books (fields title, section, author, gutenberg_id, text), which
# recipes/fetch_stories.py rebuilds. WORK_DIR gets the tokenizer, the packed shards and the run. Stop it whenever you
# like and start it again: packing and training go on where they were. LLMCTL names the program (default: llmctl);
# STEPS and MORE_STEPS change the length of the two parts of the training, THREADS the number of CPU threads.
set -eu

stories=${1:?usage: sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR}
work=${2:?usage: sh recipes/storyteller.sh STORIES.jsonl.gz WORK_DIR}
llmctl=${LLMCTL:-llmctl}
steps=${STEPS:-2000}
more_steps=${MORE_STEPS:-640}
mkdir -p "$work"

[ -d "$work/tokenizer" ] || $llmctl tokenize train "$stories" --field text --vocab-size 4096 \
  --special-token "<|im_start|>" --special-token "<|im_end|>" --out-dir "$work/tokenizer"

$llmctl tokenize pack "$stories" --field text --tokenizer "$work/tokenizer" --val-fraction 0.01 --out-dir "$work/shards"

$llmctl pretrain --data "$work/shards" --out-dir "$work/run" --auto-resume \
  --depth 4 --seq-len 512 --batch-size 16 --max-steps "$steps" --schedule wsd --decay-fraction 0.3 \
  --sample-prompt "Once upon a time" --sample-tokens 100 --eval-every 200 --save-every 50 \
  ${THREADS:+--threads "$THREADS"}

first=$work/first
[ -d "$first" ] || $llmctl export "$(ls -d "$work"/run/step-* | tail -n 1)" --dtype bf16 --output "$first"

# The second part goes on from its weights, at half the rates, in another order of the books, and falls to zero again.
$llmctl pretrain --data "$work/shards" --model "$first" --out-dir "$work/more" --auto-resume \
  --seq-len 512 --batch-size 16 --max-steps "$more_steps" --schedule linear --learning-rate 0.0015 --muon-learning-rate 0.01 --seed 1 \
  --sample-prompt "Once upon a time" --sample-tokens 60 --eval-every 160 --save-every 40 \
  ${THREADS:+--threads "$THREADS"}

# What ships is the last checkpoint in bfloat16. Its card was written by hand from the numbers that the runs printed, and
# generation_config.json got temperature 0.7, top_p 0.9 and repetition_penalty 1.1.
[ -d "$work/storyteller" ] || $llmctl export "$(ls -d "$work"/more/step-* | tail -n 1)" --dtype bf16 --output "$work/storyteller"
