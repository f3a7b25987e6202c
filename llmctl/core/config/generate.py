"""The settings of `llmctl generate`. Stdlib only; knows no tensor."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmctl.core.config.fields import check_fields, option, shard_of
from llmctl.core.errors import UsageError

_PROMPT, _TALK, _MODEL, _CHOICE, _STRUCTURE, _OUTPUT, _BATCH, _MACHINE = (
    *("Prompt", "Conversation", "Model", "Choice of tokens", "Structured answer", "Output", "Batch", "Machine"),
)

ROW_PARAMETERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Sampling settings that a row of a batch may have too, under the same names."""

STRUCTURES = ("json_schema", "regex", "choice", "grammar")
"""Settings that say what an answer must be, of which one may be given; a row of a batch may have one too."""

_MOST_DRAFTS = 256
_NOT_WITH_BEAMS = (
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop", "input", "lines"),
    *("min_new_tokens", "ignore_eos", "best_of", "logprobs", "draft_model"),
    *STRUCTURES,
)
_NOT_WITH_INTERACTIVE = ("input", "lines", "merge", "echo", "show_prompt", "code", "logprobs", "best_of", *STRUCTURES)
_NOT_WITH_SHOW_PROMPT = ("input", "echo", "stats", "logprobs", "best_of")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What `llmctl generate` does. `None` means "not given"; what is then done stands in the help."""

    text: str | None = option(
        None, "The prompt, or - to read it from stdin. Piped stdin comes before it.", metavar="PROMPT", positional=True
    )
    prompt: str | None = option(None, "The prompt, as a flag.", "-p", panel=_PROMPT)
    prompt_file: Path | None = option(
        None, "File that holds the prompt, or its beginning; - is stdin.", "-f", metavar="FILE", panel=_PROMPT
    )
    system: str | None = option(None, "System message of the chat.", panel=_PROMPT)
    preset: str | None = option(
        None, "Task to put around the prompt: summarize, qa, translate, write, code, one of your own, or a TOML file.", panel=_PROMPT
    )
    set: tuple[str, ...] = option((), "Parameter of the preset, for instance to=German. Repeatable.", metavar="NAME=VALUE", panel=_PROMPT)
    lines: bool = option(False, "Each line of stdin is a prompt; answer each in one line, in order.", panel=_PROMPT)
    chat: bool | None = option(
        None,
        "Put the prompt into the model's chat template, or take it as it is. [default: --chat if the model has a template]",
        "--chat/--raw",
        panel=_PROMPT,
    )
    chat_template: Path | None = option(None, "Jinja file to use instead of the model's chat template.", metavar="FILE", panel=_PROMPT)
    allow_special: bool = option(False, "Let names of special tokens in a raw prompt stand for those tokens.", panel=_PROMPT)
    truncate: str | None = option(
        None,
        "Cut a prompt that is too long for the context at this end, with a warning. [default: it is an error]",
        choices=("left", "right"),
        panel=_PROMPT,
    )
    echo: bool = option(False, "Print the prompt before the text.", panel=_PROMPT)
    show_prompt: bool = option(False, "Show the tokens that the model would read, one a line, and stop.", panel=_PROMPT)

    interactive: bool = option(False, "Talk with the model on the terminal; PROMPT is the first message.", panel=_TALK)
    transcript: Path | None = option(None, "Append what is said to this JSONL file, each turn at once.", metavar="FILE", panel=_TALK)
    continue_from: Path | None = option(
        None, "Take up the talk of this transcript and go on writing to it.", "--continue", metavar="FILE", panel=_TALK
    )

    model: str | None = option(
        None, "Folder, .gguf file, hub id or built-in name. [default: $LLMCTL_MODEL, else storyteller]", "-m", panel=_MODEL
    )
    adapter: str | None = option(
        None, "LoRA adapter to merge into the model: a folder in PEFT's format, or a hub id.", "--adapter-path", metavar="DIR", panel=_MODEL
    )
    tokenizer: Path | None = option(
        None, "Tokenizer to use instead of the model's own: a folder or tokenizer.json.", metavar="PATH", panel=_MODEL
    )

    max_new_tokens: int | None = option(
        None,
        "Stop after so many tokens. [default: 256, or what the context leaves]",
        "-n",
        "--max-tokens",
        minimum=1,
        maximum=1 << 31,
        panel=_CHOICE,
    )
    min_new_tokens: int | None = option(
        None, "Choose no end-of-sequence token before so many tokens.", minimum=1, maximum=1 << 31, panel=_CHOICE
    )
    ignore_eos: bool = option(False, "Go on after an end-of-sequence token.", panel=_CHOICE)
    temperature: float | None = option(
        None,
        "Divide the logits by this; 0 takes the most likely token. [default: the model's generation_config.json, else 0.8]",
        "-t",
        "--temp",
        minimum=0,
        panel=_CHOICE,
    )
    top_k: int | None = option(None, "Choose among the K most likely tokens. [default: the model's, else off]", minimum=1, panel=_CHOICE)
    top_p: float | None = option(
        None,
        "Choose among the fewest tokens that reach this probability together. [default: the model's, else 0.95]",
        above=0,
        maximum=1,
        panel=_CHOICE,
    )
    min_p: float | None = option(
        None,
        "Drop tokens less likely than this times the most likely one. [default: the model's, else off]",
        minimum=0,
        maximum=1,
        panel=_CHOICE,
    )
    repetition_penalty: float | None = option(
        None,
        "Divide positive logits (multiply negative ones) of tokens already in the text. [default: the model's, else 1]",
        above=0,
        panel=_CHOICE,
    )
    presence_penalty: float | None = option(
        None, "Subtract this from the logits of tokens already in the answer. [default: 0]", panel=_CHOICE
    )
    frequency_penalty: float | None = option(
        None, "Subtract this for each time that the token stands in the answer. [default: 0]", panel=_CHOICE
    )
    stop: tuple[str, ...] = option((), "End the text before this string. Repeatable.", metavar="TEXT", panel=_CHOICE)
    seed: int | None = option(
        None, "Seed of the random choices. [default: drawn, and printed on stderr]", minimum=0, maximum=2**63 - 1, panel=_CHOICE
    )
    num_samples: int = option(1, "How many texts to make of a prompt.", minimum=1, maximum=100_000, panel=_CHOICE)
    best_of: int | None = option(
        None,
        "Make so many texts and keep the NUM_SAMPLES whose tokens are the most probable on average.",
        minimum=1,
        maximum=100_000,
        panel=_CHOICE,
    )
    num_beams: int = option(
        1, "Search for the most probable text with so many beams; 1 chooses token by token.", minimum=1, maximum=1024, panel=_CHOICE
    )
    length_penalty: float = option(1.0, "Beam search: divide the log-probability by the length to this power.", panel=_CHOICE)
    early_stopping: str = option(
        "false",
        "Beam search: stop at NUM_BEAMS finished texts, by an estimate, or only when nothing can improve.",
        choices=("true", "false", "never"),
        panel=_CHOICE,
    )

    json_schema: str | None = option(
        None, "The answer is JSON that this schema allows; a file, or the schema itself.", metavar="FILE|TEXT", panel=_STRUCTURE
    )
    regex: str | None = option(None, "The whole answer matches this regular expression.", panel=_STRUCTURE)
    choice: tuple[str, ...] = option((), "The answer is this text or another --choice. Repeatable.", metavar="TEXT", panel=_STRUCTURE)
    grammar: str | None = option(
        None, "The answer follows this grammar, Lark or GBNF; a file, or the grammar itself.", metavar="FILE|TEXT", panel=_STRUCTURE
    )

    logprobs: int | None = option(
        None,
        "With --json or --input: tell each token's log-probability and those of the N most likely ones.",
        minimum=0,
        maximum=1000,
        panel=_OUTPUT,
    )
    code: bool = option(False, "Print only the fenced code of the answer.", panel=_OUTPUT)
    stats: bool = option(False, "Speed, time to the first token and peak memory on stderr at the end.", panel=_OUTPUT)

    input: str | None = option(
        None, "Batch: JSONL with a prompt or messages in each row, or - for stdin.", "-i", metavar="FILE", panel=_BATCH
    )
    output: str | None = option(
        None, "Batch: JSONL to append results to; run again to go on. [default: -, stdout]", "-o", metavar="FILE", panel=_BATCH
    )
    overwrite: bool = option(False, "Batch: begin anew if the output exists.", panel=_BATCH)
    ordered: bool = option(False, "Batch: results in the order of the rows, not as they finish.", panel=_BATCH)
    shard: str | None = option(
        None,
        "Batch: answer the i-th of n parts of the rows, into a file of its own beside --output. [default: the rank, under torchrun]",
        metavar="I/N",
        panel=_BATCH,
    )
    merge: bool = option(False, "Batch: check the shards of --output, join them into it, and stop.", panel=_BATCH)
    batch_size: int = option(8, "Texts under way at once; halved when memory is short.", "-b", minimum=1, maximum=65_536, panel=_BATCH)
    batch_tokens: str = option(
        "auto",
        "Tokens of the texts under way, each counted as long as the longest may become: auto (what free memory has room for), or a number.",
        metavar="N",
        panel=_BATCH,
    )

    device: str = option("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"), panel=_MACHINE)
    dtype: str | None = option(
        None,
        "Number format of the weights. [default: as stored; torch on a CPU without bf16 arithmetic takes float32]",
        "--precision",
        choices=("float32", "f32", "bfloat16", "bf16", "float16", "f16"),
        panel=_MACHINE,
    )
    quant: str | None = option(
        None,
        "Hold the weights quantised in groups of 32, embeddings and head in 8 bits. [default: as stored]",
        choices=("int8", "int4"),
        panel=_MACHINE,
    )
    executor: str = option(
        "auto",
        "What computes: the native library, on a CPU and where it knows the model, or torch.",
        choices=("auto", "native", "torch"),
        panel=_MACHINE,
    )
    kv_dtype: str | None = option(
        None,
        "How the native executor holds keys and values; int8 takes the least memory. [default: float32 with float32 weights, else float16]",
        choices=("float32", "float16", "int8"),
        panel=_MACHINE,
    )
    threads: int | None = option(None, "CPU threads. [default: all that the process may use]", minimum=1, maximum=4096, panel=_MACHINE)
    cuda_graphs: bool = option(
        True,
        "On a CUDA GPU: decode by recorded steps (CUDA graphs), which saves the starting of each kernel. Only for models without experts "
        "whose weights are not quantised.",
        panel=_MACHINE,
    )
    nproc: int | None = option(
        None,
        "Batch: processes of this machine that share the rows, one a GPU; their results are joined. [default: 1]",
        minimum=1,
        maximum=1024,
        panel=_MACHINE,
    )
    verify_cache: bool = option(
        False,
        "Check the packed weights that are kept for the model against their hashes, remove damaged ones, and stop.",
        panel=_MACHINE,
    )
    speculate: str = option(
        "auto",
        "Tokens to guess ahead, from what the text repeats or by --draft-model, which changes no text: auto (as many as pay; on torch "
        "only with --draft-model), off, or a number.",
        metavar="N",
        panel=_MACHINE,
    )
    draft_model: str | None = option(
        None, "Smaller model with the same tokenizer that guesses tokens ahead for the model.", metavar="MODEL", panel=_MACHINE
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.text is not None and self.prompt is not None:
            raise UsageError("both PROMPT and --prompt are given; one of them is enough")
        if self.input is not None:
            self._refuse_beside("--input", ("text", "prompt", "prompt_file", "echo", "lines"), "the rows hold the prompts")
            self._refuse_beside("--input", ("code",), "a row holds the whole text")
            self._refuse_beside("--input", ("merge",), "the shards hold their rows")
            if self.nproc is not None and self.nproc > 1:
                self._check_processes()
            if self.shard_numbers is not None and self.seed is None and self.temperature != 0:
                raise UsageError("--shard needs --seed (or --temperature 0), so that all shards draw from the same one")
        elif self.merge:
            self._check_merge()
        elif self.nproc is not None and self.nproc > 1:
            raise UsageError("--nproc needs --input: processes share the rows of a batch")
        elif self.ordered or self.shard is not None:
            raise UsageError(f"--{'ordered' if self.ordered else 'shard'} needs --input: it is about the rows of a batch")
        elif self.output is not None:
            raise UsageError("--output needs --input; the text of a single prompt goes to stdout, so use `> file`")
        if self.chat is False and self.system is not None:
            raise UsageError("--system needs the chat template, but --raw leaves it out; drop one of the two")
        if self.chat is False and self.chat_template is not None:
            raise UsageError("--chat-template does not go with --raw; drop one of the two")
        if self.best_of is not None and self.best_of < self.num_samples:
            raise UsageError(f"--best-of {self.best_of} is less than --num-samples {self.num_samples}; the kept texts are among those made")
        if self.min_new_tokens is not None and self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise UsageError(f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens {self.max_new_tokens}")
        if self.lines:
            self._refuse_beside("--lines", ("prompt_file", "echo", "show_prompt"), "the prompts are the lines of stdin")
            if self.num_samples > 1 or "-" in (self.text, self.prompt):
                raise UsageError(
                    "--lines gives one answer for each line of stdin; leave out " + ("-" if self.num_samples == 1 else "--num-samples")
                )
        if self.interactive:
            self._check_interactive()
        elif self.transcript is not None or self.continue_from is not None:
            flag = "--transcript" if self.transcript is not None else "--continue"
            raise UsageError(f"{flag} needs --interactive: it is about a talk")
        if self.set and self.preset is None:
            raise UsageError("--set needs --preset: it fills in a preset's parameters")
        if self.verify_cache:
            others = ("text", "prompt", "prompt_file", "input", "lines", "interactive", "merge", "show_prompt")
            self._refuse_beside("--verify-cache", others, "it makes no text")
        if self.show_prompt:
            self._refuse_beside("--show-prompt", _NOT_WITH_SHOW_PROMPT, "it shows one prompt and makes no text")
        if len(given := [name for name in STRUCTURES if getattr(self, name) not in (None, ())]) > 1:
            first, second = (name.replace("_", "-") for name in given[:2])
            raise UsageError(f"--{first} does not go with --{second}: an answer follows one of them")
        if "" in self.choice:
            raise UsageError("--choice: an empty text is no answer; leave it out")
        if "" in self.stop:
            raise UsageError("--stop: an empty string would stop at once; give some text")
        if self.speculation == "off" and self.draft_model is not None:
            raise UsageError("--draft-model does not go with --speculate off; drop one of the two")
        self.token_budget  # noqa: B018 (reading it checks it)
        if self.num_beams > 1:
            self._check_beams()

    @property
    def token_budget(self) -> Literal["auto"] | int:
        """--batch-tokens as a word or a number."""
        if self.batch_tokens == "auto":
            return "auto"
        if not re.fullmatch("[0-9]{1,12}", self.batch_tokens) or int(self.batch_tokens) < 1:
            raise UsageError(f"--batch-tokens {self.batch_tokens}: auto, or a number of tokens from 1 on is wanted")
        return int(self.batch_tokens)

    @property
    def speculation(self) -> Literal["auto", "off"] | int:
        """--speculate as a word or a number."""
        if self.speculate in ("auto", "off"):
            return "auto" if self.speculate == "auto" else "off"
        if not (re.fullmatch("[0-9]{1,4}", self.speculate) and 1 <= int(self.speculate) <= _MOST_DRAFTS):
            raise UsageError(f"--speculate {self.speculate}: auto, off, or a number of tokens from 1 to {_MOST_DRAFTS} is wanted")
        return int(self.speculate)

    def _check_processes(self) -> None:
        self._refuse_beside("--nproc", ("shard",), "each process takes a shard")
        if self.input == "-" or self.output in (None, "-"):
            raise UsageError("--nproc needs files for --input and --output: the processes share one and write shards of the other")
        if self.seed is None and self.temperature != 0:
            raise UsageError("--nproc needs --seed (or --temperature 0), so that all processes draw from the same one")

    def _check_merge(self) -> None:
        self._refuse_beside("--merge", ("text", "prompt", "prompt_file", "lines", "shard", "ordered"), "it joins what is there")
        if self.output in (None, "-"):
            raise UsageError("--merge needs --output FILE, as it was given to the shards")

    def _check_interactive(self) -> None:
        self._refuse_beside("--interactive", _NOT_WITH_INTERACTIVE, "it is a talk on the terminal, a message and an answer at a time")
        self._refuse_beside("--interactive", ("truncate",), "of a talk that is too long the oldest turns are left out")
        if self.num_samples > 1 or self.num_beams > 1:
            flag = "--num-samples" if self.num_samples > 1 else "--num-beams"
            raise UsageError(f"--interactive gives one answer at a time; leave out {flag}")
        if "-" in (self.text, self.prompt) or self.prompt_file == Path("-"):
            raise UsageError("--interactive reads the keyboard; give the first message as an argument or a file, not as -")

    @property
    def shard_numbers(self) -> tuple[int, int] | None:
        """--shard I/N as numbers."""
        return None if self.shard is None else shard_of(self.shard)

    def _refuse_beside(self, flag: str, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value is not False and value != ():
                other = "PROMPT" if name == "text" else "--" + name.replace("_", "-")
                raise UsageError(f"{other} does not go with {flag}: {reason}")

    def _check_beams(self) -> None:
        self._refuse_beside("--num-beams", _NOT_WITH_BEAMS, "beam search draws nothing at random and takes one prompt")
        if self.num_samples > self.num_beams:
            raise UsageError(
                f"--num-samples {self.num_samples}: a search with --num-beams {self.num_beams} ends with {self.num_beams} texts at most"
            )

    def given_sampling(self) -> dict[str, Any]:
        """The sampling settings that were given, by name."""
        return {name: value for name in ROW_PARAMETERS if (value := getattr(self, name)) is not None}
