"""The settings of `llmctl finetune`. Stdlib only; knows no tensor. What pretrain has too is declared there, once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, flag_of, option, option_like, options_of
from llmctl.core.config.mesh import parse_mesh
from llmctl.core.config.pretrain import PretrainConfig, seconds, skips_allowed
from llmctl.core.errors import UsageError

_DATA, _LORA, _BUDGET = "Model and data", "LoRA", "Budget"

DEFAULT_EPOCHS = 3.0
_LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
_LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What `llmctl finetune` does. `None` means "not given": the plan then chooses, and says what it chose."""

    model: str | None = option(None, "Model to start from: a folder, .gguf file, hub id or built-in name.", "-m", panel=_DATA)
    data: tuple[Path, ...] = option(
        (), "JSONL or JSON file of rows in chat or instruction form, may be .gz or .zst; repeatable.", metavar="FILE", panel=_DATA
    )
    val_data: tuple[Path, ...] = option((), "File of rows to evaluate on; repeatable.", metavar="FILE", panel=_DATA)
    val_fraction: float = option(
        0.0, "Part of the rows of --data to hold out for evaluation, chosen by a hash of the row.", minimum=0, below=1, panel=_DATA
    )
    out_dir: Path | None = option_like(PretrainConfig, "out_dir")
    method: str = option(
        "full", "What is trained: every weight, or small adapters beside them (LoRA).", choices=("full", "lora"), panel=_DATA
    )
    mask_prompt: bool = option(True, "Loss on the answers only, not on system and user turns.", panel=_DATA)
    chat_template: Path | None = option(
        None, "Chat template (jinja2) to use and to save, instead of the model's own.", metavar="FILE", panel=_DATA
    )
    chat: bool | None = option(
        None,
        "Put prompt/completion rows into the chat template, or take them as plain text. [default: --chat if the model has a template]",
        "--chat/--raw",
        panel=_DATA,
    )
    seq_len: int | None = option(
        None,
        "Tokens in a training sequence; rows are packed into it. [default: as the longest row, from 256 to 1024]",
        "--max-seq-length",
        minimum=2,
        panel=_DATA,
    )
    too_long: str = option(
        "cut-end",
        "A row longer than --seq-len: keep its beginning, its end, leave it out, or stop.",
        choices=("cut-end", "cut-start", "drop", "error"),
        panel=_DATA,
    )
    drop_empty: bool = option(False, "Leave out rows that have no answer token within --seq-len, instead of stopping.", panel=_DATA)
    on_error: str = option("stop", "At a row that breaks a rule: stop, or skip it and list it.", choices=("stop", "skip"), panel=_DATA)
    resize_vocab: bool = option(False, "Let the embeddings grow to the tokenizer's size where they are smaller.", panel=_DATA)
    seed: int = option_like(PretrainConfig, "seed", help="Seed of the order of the data.")

    lora_rank: int = option(16, "Rank of each adapter.", "--lora-r", minimum=1, maximum=4096, panel=_LORA)
    lora_alpha: float | None = option(
        None, "Adapters count alpha / rank times. [default: twice the rank]", above=0, maximum=1e6, panel=_LORA
    )
    lora_dropout: float = option(0.0, "Share of an adapter's inputs to leave out at random in training.", minimum=0, below=1, panel=_LORA)
    lora_targets: tuple[str, ...] = option(
        ("all-linear",),
        "Modules to adapt, by their names in transformers: q_proj,v_proj or c_attn; all-linear is all in the layers.",
        metavar="NAME[,NAME]",
        panel=_LORA,
    )

    epochs: float | None = option(
        None, "Stop after so many passes over the rows. [default: 3, when no budget is given]", above=0, panel=_BUDGET
    )
    max_steps: int | None = option_like(PretrainConfig, "max_steps")
    max_tokens: int | None = option_like(PretrainConfig, "max_tokens")
    max_time: str | None = option_like(PretrainConfig, "max_time")
    batch_size: int | None = option_like(
        PretrainConfig,
        "batch_size",
        default=None,
        help="Packed sequences of --seq-len tokens in an optimizer step, at most an epoch's. [default: as many as hold about 16 rows]",
    )
    micro_batch_size: int | None = option_like(
        PretrainConfig, "micro_batch_size", help="Sequences in one forward and backward pass. [default: as many as make 2048 tokens]"
    )

    optimizer: str = option_like(PretrainConfig, "optimizer", default="adamw")
    learning_rate: float | None = option_like(
        PretrainConfig, "learning_rate", default=None, help="Peak learning rate of AdamW. [default: 2e-05, with --method lora 0.0002]"
    )
    muon_learning_rate: float = option_like(PretrainConfig, "muon_learning_rate", default=2e-4)
    weight_decay: float = option_like(PretrainConfig, "weight_decay", default=0.0)
    beta1: float = option_like(PretrainConfig, "beta1")
    beta2: float = option_like(PretrainConfig, "beta2")
    muon_momentum: float = option_like(PretrainConfig, "muon_momentum")
    clip: float = option_like(PretrainConfig, "clip")
    schedule: str = option_like(PretrainConfig, "schedule", default="cosine")
    warmup_steps: int | None = option_like(PretrainConfig, "warmup_steps", help="Steps of linear warm-up. [default: 3 % of the steps]")
    decay_fraction: float = option_like(PretrainConfig, "decay_fraction")
    final_lr_fraction: float = option_like(PretrainConfig, "final_lr_fraction")

    eval_every: int | None = option_like(
        PretrainConfig,
        "eval_every",
        help="Steps between evaluations; 0 evaluates at the end only. [default: an epoch, less if that is long]",
    )
    eval_tokens: int | None = option_like(PretrainConfig, "eval_tokens")
    save_every: int | None = option_like(
        PretrainConfig, "save_every", help="Steps between checkpoints; 0 saves at the end only. [default: an epoch, less if that is long]"
    )
    log_every: int = option_like(PretrainConfig, "log_every")
    log: tuple[str, ...] = option_like(PretrainConfig, "log")
    keep_last: int = option_like(PretrainConfig, "keep_last")
    resume: bool = option_like(PretrainConfig, "resume")
    resume_from: Path | None = option_like(PretrainConfig, "resume_from")
    auto_resume: bool = option_like(PretrainConfig, "auto_resume")
    allow_change: tuple[str, ...] = option_like(PretrainConfig, "allow_change")
    nonfinite: str = option_like(PretrainConfig, "nonfinite")
    on_full: str = option_like(PretrainConfig, "on_full")
    dry_run: bool = option_like(PretrainConfig, "dry_run")
    plan_for: str | None = option_like(PretrainConfig, "plan_for")

    device: str = option_like(PretrainConfig, "device")
    dtype: str = option_like(PretrainConfig, "dtype")
    threads: int | None = option_like(PretrainConfig, "threads")
    nproc: int | None = option_like(PretrainConfig, "nproc")
    mesh: str | None = option_like(PretrainConfig, "mesh")
    offload: bool = option_like(PretrainConfig, "offload")
    rank_timeout: float = option_like(PretrainConfig, "rank_timeout")

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.resume or self.auto_resume or self.resume_from is not None):
            self._check_method()  # of a run to go on with, the folder says the method
        if self.method == "lora" and self.resize_vocab:
            raise UsageError("--resize-vocab does not go with --method lora, which leaves the embeddings as they are; use --method full")
        if not self.target_names or ("all-linear" in self.target_names and len(self.target_names) > 1):
            raise UsageError(f"--lora-targets {','.join(self.lora_targets)}: module names are wanted, or all-linear alone")
        given = [f"--{n.replace('_', '-')}" for n in ("max_steps", "max_tokens", "epochs", "max_time") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: give one budget, not {len(given)}")
        if self.val_data and self.val_fraction:
            raise UsageError("--val-data and --val-fraction: give one of them")
        if self.micro_batch_size is not None and self.batch_size is not None and self.batch_size % self.micro_batch_size:
            raise UsageError(f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}")
        if sum((self.resume, self.auto_resume, self.resume_from is not None)) > 1:
            raise UsageError("--resume, --resume-from and --auto-resume: give one of them")
        if self.plan_for is not None and not self.dry_run:
            raise UsageError("--plan-for: a plan for other machines; give --dry-run with it")
        mesh = parse_mesh(self.mesh, num_processes=self.nproc)
        if self.offload and not mesh.shards:
            raise UsageError("--offload: give a --mesh with fsdp, whose parts of the model can wait in the CPU's memory")
        if self.lora_dropout and mesh.tp > 1:
            raise UsageError("--lora-dropout: falls on whole inputs, and a process of tp sees a part of some; use fsdp, or leave it out")
        if self.max_time is not None:
            seconds(self.max_time, flag="--max-time")
        skips_allowed(self.nonfinite)

    def _check_method(self) -> None:
        beside = [f for f in options_of(type(self)) if f.name in _LORA_FIELDS and getattr(self, f.name) != f.default]
        if beside and self.method != "lora":
            raise UsageError(f"{flag_of(beside[0])} needs --method lora")

    @property
    def target_names(self) -> tuple[str, ...]:
        """--lora-targets, commas taken apart."""
        return tuple(dict.fromkeys(name.strip() for entry in self.lora_targets for name in entry.split(",") if name.strip()))

    def with_defaults(self) -> "FinetuneConfig":
        """The same with those defaults filled in that hang on other settings. Raises UsageError for adapters that nothing asks for."""
        self._check_method()
        rate = self.learning_rate if self.learning_rate is not None else _LEARNING_RATES[self.method]
        alpha = self.lora_alpha
        if self.method == "lora" and alpha is None:
            alpha = 2.0 * self.lora_rank
        return dataclasses.replace(self, learning_rate=rate, lora_alpha=alpha)
