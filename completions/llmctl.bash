# bash completion of llmctl. Generated from the command tree by `make completions`; do not edit.
# Use: source this file, or copy it to ~/.local/share/bash-completion/completions/llmctl

_llmctl_names() {
    local IFS=$'\n'
    COMPREPLY=( $(compgen "$1" -- "$cur") )
    compopt -o filenames 2>/dev/null
}

_llmctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path='' only_arguments='' i word
    COMPREPLY=()
    # "=" is a word of its own: --flag=value comes as three.
    if [[ $cur == '=' ]]; then
        cur=''
    elif [[ $prev == '=' ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for (( i = 1; i < COMP_CWORD; i++ )); do
        word=${COMP_WORDS[i]}
        if [[ $word == '--' ]]; then
            only_arguments=1
            prev=''
            break
        fi
        case $path in
            ''|'tokenize')
                [[ $word == -* ]] || path="${path:+$path }$word"
                ;;
        esac
    done
    local words='' values='' argument=''
    case $path in
        '')
            words='tokenize pretrain finetune generate eval export --version -h --help'
            ;;
        'tokenize')
            words='train encode decode count inspect pack merge verify -h --help'
            ;;
        'tokenize train')
            words='--out-dir -o --output-dir --overwrite --no-overwrite --from-model --from --vocab-size --kind --pattern --special-token --chat --no-chat --chat-template --min-frequency --format --field --on-error --max-line-bytes --sample-bytes --seed --threads --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --out-dir|-o|--output-dir) values='dir' ;;
                --from-model|--from|--chat-template|--config|-c) values='file' ;;
                --vocab-size|--special-token|--min-frequency|--field|--max-line-bytes|--sample-bytes|--seed|--threads) values='any' ;;
                --kind) values='bpe word' ;;
                --pattern) values='llama3 gpt2' ;;
                --format) values='text lines paragraphs jsonl' ;;
                --on-error) values='stop skip' ;;
            esac
            ;;
        'tokenize encode')
            words='--tokenizer --allow-special --no-allow-special --add-bos --no-add-bos --on-error --max-line-bytes --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --tokenizer|--config|-c) values='file' ;;
                --on-error) values='stop skip' ;;
                --max-line-bytes) values='any' ;;
            esac
            ;;
        'tokenize decode')
            words='--tokenizer --skip-special --no-skip-special --on-error --max-line-bytes --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --tokenizer|--config|-c) values='file' ;;
                --on-error) values='stop skip' ;;
                --max-line-bytes) values='any' ;;
            esac
            ;;
        'tokenize count')
            words='--tokenizer --format --field --allow-special --no-allow-special --on-error --max-line-bytes --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --tokenizer|--config|-c) values='file' ;;
                --format) values='text lines paragraphs jsonl' ;;
                --field|--max-line-bytes) values='any' ;;
                --on-error) values='stop skip' ;;
            esac
            ;;
        'tokenize inspect')
            words='--tokenizer --show-chars --sample-bytes --format --field --max-line-bytes --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --tokenizer|--config|-c) values='file' ;;
                --show-chars|--sample-bytes|--field|--max-line-bytes) values='any' ;;
                --format) values='text lines paragraphs jsonl' ;;
            esac
            ;;
        'tokenize pack')
            words='--tokenizer --out-dir -o --output-dir --format --field --separator --allow-special --no-allow-special --add-bos --no-add-bos --on-error --max-line-bytes --val-fraction --val-by --val-data --split-seed --shard-tokens --workers --encoder --normalize --min-chars --max-chars --script --redact --dedupe --decontaminate --eval-data --shard --overwrite --no-overwrite --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --tokenizer|--val-data|--redact|--config|-c) values='file' ;;
                --out-dir|-o|--output-dir|--eval-data) values='dir' ;;
                --format) values='text lines paragraphs jsonl' ;;
                --field|--separator|--max-line-bytes|--val-fraction|--split-seed|--shard-tokens|--workers|--min-chars|--max-chars|--script|--decontaminate|--shard) values='any' ;;
                --on-error) values='stop skip' ;;
                --val-by) values='hash tail' ;;
                --encoder) values='auto tokenizers' ;;
                --normalize) values='nfc ftfy' ;;
                --dedupe) values='exact near' ;;
            esac
            ;;
        'tokenize merge')
            words='--out-dir -o --output-dir --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='dir'
            case $prev in
                --out-dir|-o|--output-dir) values='dir' ;;
                --config|-c) values='file' ;;
            esac
            ;;
        'tokenize verify')
            words='--config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='dir'
            case $prev in
                --config|-c) values='file' ;;
            esac
            ;;
        'pretrain')
            words='--data --val-data --out-dir -o --output-dir --depth --model-config --model -m --init-embeddings --family --seq-len --max-seq-length --seed --max-steps --max-tokens --epochs --max-time --batch-size -b --micro-batch-size --optimizer --learning-rate --lr --muon-learning-rate --weight-decay --beta1 --beta2 --muon-momentum --clip --schedule --warmup-steps --decay-fraction --final-lr-fraction --label-smoothing --z-loss --dropout --ema --eval-every --eval-tokens --sample-every --sample-prompt --sample-tokens --save-every --async-save --no-async-save --log-every --keep-last --resume --no-resume --resume-from --auto-resume --no-auto-resume --allow-change --nonfinite --on-spike --on-full --dry-run --no-dry-run --plan-for --log --report --report-file --device --dtype --precision --gradient-checkpointing --no-gradient-checkpointing --compile --profile --no-profile --threads --nproc --mesh --offload --no-offload --rank-timeout --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            case $prev in
                --data|--val-data|--out-dir|-o|--output-dir|--resume-from) values='dir' ;;
                --depth|--seq-len|--max-seq-length|--seed|--max-steps|--max-tokens|--epochs|--max-time|--batch-size|-b|--micro-batch-size|--learning-rate|--lr|--muon-learning-rate|--weight-decay|--beta1|--beta2|--muon-momentum|--clip|--warmup-steps|--decay-fraction|--final-lr-fraction|--label-smoothing|--z-loss|--dropout|--ema|--eval-every|--eval-tokens|--sample-every|--sample-prompt|--sample-tokens|--save-every|--log-every|--keep-last|--allow-change|--nonfinite|--plan-for|--threads|--nproc|--mesh|--rank-timeout) values='any' ;;
                --model-config|--model|-m|--init-embeddings|--report|--report-file|--config|-c) values='file' ;;
                --family) values='qwen3 llama gpt2' ;;
                --optimizer) values='muon adamw' ;;
                --schedule) values='cosine linear wsd' ;;
                --on-spike) values='ignore rewind' ;;
                --on-full) values='fail wait' ;;
                --log) values='tensorboard wandb mlflow trackio codecarbon' ;;
                --device) values='auto cpu cuda mps' ;;
                --dtype|--precision) values='auto bf16 f32' ;;
                --compile) values='auto on off' ;;
            esac
            ;;
        'finetune')
            words='--model -m --data --val-data --val-fraction --out-dir -o --output-dir --method --mask-prompt --no-mask-prompt --chat-template --chat --raw --seq-len --max-seq-length --too-long --drop-empty --no-drop-empty --on-error --resize-vocab --no-resize-vocab --seed --lora-rank --lora-r --lora-alpha --lora-dropout --lora-targets --epochs --max-steps --max-tokens --max-time --batch-size -b --micro-batch-size --optimizer --learning-rate --lr --muon-learning-rate --weight-decay --beta1 --beta2 --muon-momentum --clip --schedule --warmup-steps --decay-fraction --final-lr-fraction --eval-every --eval-tokens --save-every --log-every --log --keep-last --resume --no-resume --resume-from --auto-resume --no-auto-resume --allow-change --nonfinite --on-full --dry-run --no-dry-run --plan-for --device --dtype --precision --threads --nproc --mesh --offload --no-offload --rank-timeout --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            case $prev in
                --model|-m|--data|--val-data|--chat-template|--config|-c) values='file' ;;
                --val-fraction|--seq-len|--max-seq-length|--seed|--lora-rank|--lora-r|--lora-alpha|--lora-dropout|--lora-targets|--epochs|--max-steps|--max-tokens|--max-time|--batch-size|-b|--micro-batch-size|--learning-rate|--lr|--muon-learning-rate|--weight-decay|--beta1|--beta2|--muon-momentum|--clip|--warmup-steps|--decay-fraction|--final-lr-fraction|--eval-every|--eval-tokens|--save-every|--log-every|--keep-last|--allow-change|--nonfinite|--plan-for|--threads|--nproc|--mesh|--rank-timeout) values='any' ;;
                --out-dir|-o|--output-dir|--resume-from) values='dir' ;;
                --method) values='full lora' ;;
                --too-long) values='cut-end cut-start drop error' ;;
                --on-error) values='stop skip' ;;
                --optimizer) values='muon adamw' ;;
                --schedule) values='cosine linear wsd' ;;
                --log) values='tensorboard wandb mlflow trackio codecarbon' ;;
                --on-full) values='fail wait' ;;
                --device) values='auto cpu cuda mps' ;;
                --dtype|--precision) values='auto bf16 f32' ;;
            esac
            ;;
        'generate')
            words='--prompt -p --prompt-file -f --system --preset --set --lines --no-lines --chat --raw --chat-template --allow-special --no-allow-special --truncate --echo --no-echo --show-prompt --no-show-prompt --interactive --no-interactive --transcript --continue-from --continue --model -m --adapter --adapter-path --tokenizer --max-new-tokens -n --max-tokens --min-new-tokens --ignore-eos --no-ignore-eos --temperature -t --temp --top-k --top-p --min-p --repetition-penalty --presence-penalty --frequency-penalty --stop --seed --num-samples --best-of --num-beams --length-penalty --early-stopping --json-schema --regex --choice --grammar --logprobs --code --no-code --stats --no-stats --input -i --output -o --overwrite --no-overwrite --ordered --no-ordered --shard --merge --no-merge --batch-size -b --batch-tokens --device --dtype --precision --quant --executor --kv-dtype --threads --cuda-graphs --no-cuda-graphs --nproc --verify-cache --no-verify-cache --speculate --draft-model --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='any'
            case $prev in
                --prompt|-p|--system|--preset|--set|--adapter|--adapter-path|--max-new-tokens|-n|--max-tokens|--min-new-tokens|--temperature|-t|--temp|--top-k|--top-p|--min-p|--repetition-penalty|--presence-penalty|--frequency-penalty|--stop|--seed|--num-samples|--best-of|--num-beams|--length-penalty|--json-schema|--regex|--choice|--grammar|--logprobs|--shard|--batch-size|-b|--batch-tokens|--threads|--nproc|--speculate|--draft-model) values='any' ;;
                --prompt-file|-f|--chat-template|--transcript|--continue-from|--continue|--model|-m|--tokenizer|--input|-i|--output|-o|--config|-c) values='file' ;;
                --truncate) values='left right' ;;
                --early-stopping) values='true false never' ;;
                --device) values='auto cpu cuda mps' ;;
                --dtype|--precision) values='float32 f32 bfloat16 bf16 float16 f16' ;;
                --quant) values='int8 int4' ;;
                --executor) values='auto native torch' ;;
                --kv-dtype) values='float32 float16 int8' ;;
            esac
            ;;
        'eval')
            words='--model -m --adapter --adapter-path --tokenizer --bos --seq-len --max-seq-length --stride --field --split --tasks --data --limit --num-fewshot --seed --output -o --log-samples --overwrite --no-overwrite --fail-under --cache --no-cache --cache-dir --restart --no-restart --batch-size -b --device --dtype --precision --quant --threads --nproc --rank-timeout --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --model|-m|--tokenizer|--output|-o|--log-samples|--config|-c) values='file' ;;
                --adapter|--adapter-path|--seq-len|--max-seq-length|--stride|--field|--tasks|--limit|--num-fewshot|--seed|--fail-under|--batch-size|-b|--threads|--nproc|--rank-timeout) values='any' ;;
                --bos) values='auto yes no' ;;
                --split) values='train val' ;;
                --data|--cache-dir) values='dir' ;;
                --device) values='auto cpu cuda mps' ;;
                --dtype|--precision) values='float32 f32 bfloat16 bf16 float16 f16' ;;
                --quant) values='int8 int4' ;;
            esac
            ;;
        'export')
            words='--adapter --adapter-path --output -o --out-dir --output-dir --format --overwrite --no-overwrite --verify --no-verify --max-shard-size --binary --no-binary --dtype --precision --quant --threads --config -c --print-config --json --quiet -q --verbose -v --debug -h --help'
            argument='file'
            case $prev in
                --adapter|--adapter-path|--max-shard-size|--threads) values='any' ;;
                --output|-o|--out-dir|--output-dir|--config|-c) values='file' ;;
                --format) values='hf gguf quant word2vec onnx' ;;
                --dtype|--precision) values='float32 f32 bfloat16 bf16 float16 f16 q8_0 q4_0' ;;
                --quant) values='int8 int4' ;;
            esac
            ;;
        *) return ;;
    esac
    if [[ -z $only_arguments && $values == 'file' ]]; then
        _llmctl_names -f
    elif [[ -z $only_arguments && $values == 'dir' ]]; then
        _llmctl_names -d
    elif [[ -z $only_arguments && $values == 'any' ]]; then
        return
    elif [[ -z $only_arguments && -n $values ]]; then
        COMPREPLY=( $(compgen -W "$values" -- "$cur") )
    elif [[ -z $only_arguments && ( $cur == -* || -z $argument ) ]]; then
        COMPREPLY=( $(compgen -W "$words" -- "$cur") )
    elif [[ $argument == 'file' ]]; then
        _llmctl_names -f
    elif [[ $argument == 'dir' ]]; then
        _llmctl_names -d
    fi
}

complete -F _llmctl llmctl
