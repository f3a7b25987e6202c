"""The settings of `llmctl eval`. Stdlib only; knows no tensor."""

import math
from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, option, option_like
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import UsageError

_MODEL, _TEXT, _TASKS, _OUT, _MACHINE = "Model", "Perplexity of text", "Tasks", "Results", "Machine"


@dataclass(frozen=True)
class Gate:
    """One `--fail-under`: the metric's name ("acc", "hellaswag.acc_norm") and the worst value that passes."""

    metric: str
    bound: float


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `llmctl eval` does. `None` means "not given"."""

    texts: tuple[Path, ...] = option(
        (), "Texts to score: .txt, .jsonl, both also .gz or .zst, or a folder of token shards.", metavar="TEXTFILES...", positional=True
    )

    model: str | None = option(
        None, "Folder, .gguf file, hub id or built-in name. [default: $LLMCTL_MODEL, else storyteller]", "-m", panel=_MODEL
    )
    adapter: str | None = option_like(GenerateConfig, "adapter")
    tokenizer: Path | None = option(None, "Tokenizer to use instead of the model's own: a folder or tokenizer.json.", panel=_MODEL)
    bos: str = option(
        "auto",
        "Start each text with BOS: as the model's tokenizer does, always (the end-of-text token where there is no BOS), or never.",
        choices=("auto", "yes", "no"),
        panel=_MODEL,
    )
    seq_len: int | None = option(
        None,
        "Context in tokens; what is longer is cut or windowed. [default: the model's, for text at most 2048]",
        "--max-seq-length",
        minimum=1,
        panel=_MODEL,
    )

    stride: int | None = option(
        None, "Tokens scored in each window after the first; fewer give each more context. [default: --seq-len]", minimum=1, panel=_TEXT
    )
    field: str = option("text", "Field of the .jsonl objects that holds the text.", metavar="NAME", panel=_TEXT)
    split: str = option("val", "Split of a folder of token shards.", choices=("train", "val"), panel=_TEXT)

    tasks: tuple[str, ...] = option(
        (), "Tasks, comma-separated or repeated: built-in names, or paths of .toml task files.", metavar="NAME[,NAME]", panel=_TASKS
    )
    data: Path | None = option(None, "Folder of the tasks' data. [default: that of a task file given by path]", metavar="DIR", panel=_TASKS)
    limit: int | None = option(None, "Use the first N items of each task (of texts: the first N documents).", minimum=1, panel=_TASKS)
    num_fewshot: int = option(0, "Solved examples before each question.", minimum=0, maximum=1000, panel=_TASKS)
    seed: int = option(1234, "Seed of the choice of few-shot examples.", minimum=0, maximum=2**63 - 1, panel=_TASKS)

    output: Path | None = option(
        None, "Write the results as JSON to this file; `-` is stdout, instead of the table.", "-o", metavar="FILE", panel=_OUT
    )
    log_samples: Path | None = option(None, "Write one JSON line an item: prompt, choices, scores, verdict.", metavar="FILE", panel=_OUT)
    overwrite: bool = option(False, "Replace the files of --output and --log-samples if they exist.", panel=_OUT)
    fail_under: tuple[str, ...] = option(
        (),
        "Exit 7 if a metric is worse than this (lower, or for perplexity and bits_per_byte higher); "
        "METRIC is acc, hellaswag.acc_norm, perplexity ... Repeatable.",
        metavar="METRIC=VALUE",
        panel=_OUT,
    )
    cache: bool = option(True, "Keep finished scores, so that the same command goes on where it was ended.", panel=_OUT)
    cache_dir: Path | None = option(
        None,
        "Where finished scores are kept, up to 256 MB. [default: $XDG_CACHE_HOME/llmctl/eval or ~/.cache/llmctl/eval]",
        metavar="DIR",
        panel=_OUT,
    )
    restart: bool = option(False, "Forget the finished scores of an interrupted run of this command.", panel=_OUT)

    batch_size: int | None = option(
        None,
        "Sequences scored at once; an item's choices stay together. [default: as many as make 2048 tokens, on a GPU 65536]",
        "-b",
        minimum=1,
        maximum=65536,
        panel=_MACHINE,
    )
    device: str = option_like(GenerateConfig, "device")
    dtype: str | None = option_like(GenerateConfig, "dtype")
    quant: str | None = option_like(GenerateConfig, "quant")
    threads: int | None = option_like(GenerateConfig, "threads")
    nproc: int | None = option_like(PretrainConfig, "nproc", help="Processes of this machine to share the work, one a GPU. [default: 1]")
    rank_timeout: float = option_like(PretrainConfig, "rank_timeout")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seq_len is not None and self.stride is not None and self.stride > self.seq_len:
            raise UsageError(f"--stride {self.stride}: more than the context of --seq-len {self.seq_len}; tokens would be left out")
        names = self.task_names
        if len(set(names)) != len(names):
            raise UsageError(f"--tasks {','.join(names)}: a task is named twice")
        if self.output is not None and self.output == self.log_samples:
            raise UsageError(f"--output and --log-samples are both {self.output}; give them two names")
        if self.log_samples == Path("-"):
            raise UsageError("--log-samples -: stdout is for the results; name a file")
        if self.log_samples is not None and not names:
            raise UsageError("--log-samples: needs --tasks; texts have no items")
        self.gates  # noqa: B018 - checked here, while nothing has been created

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, commas taken apart."""
        return tuple(name.strip() for entry in self.tasks for name in entry.split(",") if name.strip())

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The values of --fail-under, taken apart. Raises UsageError."""
        return tuple(_gate(text) for text in self.fail_under)


def _gate(text: str) -> Gate:
    name, equals, value = text.rpartition("=")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not equals or not name.strip() or not math.isfinite(bound):
        raise UsageError(f"--fail-under {text!r}: METRIC=VALUE is wanted, for instance acc_norm=0.3")
    return Gate(name.strip(), bound)
