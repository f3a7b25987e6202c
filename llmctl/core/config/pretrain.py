"""The settings of `llmctl pretrain`. Stdlib only; knows no tensor."""

from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, option
from llmctl.core.config.mesh import parse_mesh
from llmctl.core.config.mixture import parse_mixture
from llmctl.core.errors import UsageError

_MODEL, _BUDGET, _OPTIM, _RUN, _MACHINE = "Model and data", "Budget", "Optimizer", "Run folder and resume", "Machine"
_WATCH = "Watching"

RESUME_ONLY = (
    "resume",
    "resume_from",
    "auto_resume",
    "allow_change",
    "dry_run",
    "plan_for",
    "async_save",
    "report",
    "report_file",
    "nproc",
    "mesh",
    "offload",
    "rank_timeout",
)
"""Settings of one invocation rather than of the run: a run's stored config leaves them out."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What `llmctl pretrain` does. `None` means "not given": the plan then chooses, and says what it chose."""

    data: tuple[Path, ...] = option(
        (),
        "Folder of token shards, made by `llmctl tokenize pack`. Repeatable as DIR=PART, for parts of the tokens. "
        "[default of PART: by the folders' sizes]",
        metavar="DIR",
        panel=_MODEL,
    )
    val_data: Path | None = option(
        None, "Folder of token shards to evaluate on, instead of the validation split of --data.", metavar="DIR", panel=_MODEL
    )
    out_dir: Path | None = option(
        None, "Run folder to create: checkpoints, metrics, status.", "-o", "--output-dir", metavar="DIR", panel=_MODEL
    )
    depth: int | None = option(
        None,
        "Size dial: number of layers; width, heads and the rest follow from it. [default: 4, without --model and --model-config]",
        minimum=1,
        maximum=512,
        panel=_MODEL,
    )
    model_config: Path | None = option(
        None, "Architecture as a Hugging Face config.json; weights start at random.", metavar="FILE", panel=_MODEL
    )
    model: str | None = option(None, "Model whose weights to go on from: a folder, .gguf file, or hub id.", "-m", panel=_MODEL)
    init_embeddings: Path | None = option(
        None,
        "Start the embeddings of a new model from word vectors (word2vec's format, as `llmctl export` writes it), matched by token.",
        metavar="FILE",
        panel=_MODEL,
    )
    family: str = option("qwen3", "Family of a new model made with --depth.", choices=("qwen3", "llama", "gpt2"), panel=_MODEL)
    seq_len: int = option(256, "Tokens in a training sequence.", "--max-seq-length", minimum=2, panel=_MODEL)
    seed: int = option(0, "Seed of the initial weights and of the order of the data.", minimum=0, maximum=2**63 - 1, panel=_MODEL)

    max_steps: int | None = option(None, "Stop after so many optimizer steps.", minimum=1, panel=_BUDGET)
    max_tokens: int | None = option(None, "Stop after so many training tokens.", minimum=1, panel=_BUDGET)
    epochs: float | None = option(
        None, "Stop after so many passes over the data. [default: 1, when no budget is given]", above=0, panel=_BUDGET
    )
    max_time: str | None = option(
        None, "Stop after about so long, as 90s, 30m or 1.5h: turned into a number of steps once, by timing.", metavar="TIME", panel=_BUDGET
    )
    batch_size: int = option(32, "Sequences in an optimizer step.", "-b", minimum=1, panel=_BUDGET)
    micro_batch_size: int | None = option(
        None, "Sequences in one forward and backward pass. [default: as many as make 8192 tokens]", minimum=1, panel=_BUDGET
    )

    optimizer: str = option(
        "muon", "Muon for hidden matrices and AdamW for the rest, or AdamW alone.", choices=("muon", "adamw"), panel=_OPTIM
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW. [default: 0.003 for a width of 256, falling with its square root]",
        "--lr",
        above=0,
        panel=_OPTIM,
    )
    muon_learning_rate: float = option(0.02, "Peak learning rate of Muon.", above=0, panel=_OPTIM)
    weight_decay: float = option(0.1, "Decoupled weight decay, on matrices only.", minimum=0, panel=_OPTIM)
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients.", minimum=0, below=1, panel=_OPTIM)
    beta2: float = option(0.95, "AdamW: decay of the mean of squared gradients.", minimum=0, below=1, panel=_OPTIM)
    muon_momentum: float = option(0.95, "Muon: momentum.", minimum=0, below=1, panel=_OPTIM)
    clip: float = option(1.0, "Largest norm of the gradient; 0 turns clipping off.", minimum=0, panel=_OPTIM)
    schedule: str = option(
        "linear",
        "After the warm-up: fall along a cosine, on a line, or stay and fall at the end.",
        choices=("cosine", "linear", "wsd"),
        panel=_OPTIM,
    )
    warmup_steps: int | None = option(None, "Steps of linear warm-up. [default: 2 % of the steps, at most 200]", minimum=0, panel=_OPTIM)
    decay_fraction: float = option(0.2, "wsd: the part of the steps over which the rate falls.", above=0, maximum=1, panel=_OPTIM)
    final_lr_fraction: float = option(0.0, "Learning rate at the end, as a part of the peak.", minimum=0, maximum=1, panel=_OPTIM)

    label_smoothing: float = option(
        0.0, "Train towards 1 - X for the next token and X spread over the vocabulary.", minimum=0, below=1, panel=_OPTIM
    )
    z_loss: float = option(
        0.0, "Add X times the square of log softmax's denominator to each token's loss; 1e-4 is usual.", minimum=0, panel=_OPTIM
    )
    dropout: float = option(
        0.0, "Leave out this part of the embeddings and of what each layer adds, for small data.", minimum=0, below=1, panel=_OPTIM
    )
    ema: float = option(
        0.0,
        "Decay of a moving average of the weights, which is evaluated too and lies in ema/ of the last checkpoint; 0 keeps none.",
        minimum=0,
        below=1,
        panel=_OPTIM,
    )

    eval_every: int | None = option(
        None, "Steps between evaluations; 0 evaluates at the end only. [default: a tenth of the run]", minimum=0, panel=_RUN
    )
    eval_tokens: int | None = option(
        None, "Evaluate on at most so many tokens. [default: 65536, and 4194304 at the end]", minimum=1, panel=_RUN
    )
    sample_every: int | None = option(
        None, "Steps between sample texts; 0 turns them off. [default: as --eval-every]", minimum=0, panel=_RUN
    )
    sample_prompt: str = option("", "Beginning of the sample texts.", panel=_RUN)
    sample_tokens: int = option(64, "Tokens of a sample text.", minimum=1, panel=_RUN)
    save_every: int | None = option(
        None, "Steps between checkpoints; 0 saves at the end only. [default: a tenth of the run]", minimum=0, panel=_RUN
    )
    async_save: bool = option(False, "Write checkpoints while training goes on, from a copy of the state in the CPU's memory.", panel=_RUN)
    log_every: int = option(10, "Steps between lines of progress.", minimum=1, panel=_RUN)
    keep_last: int = option(2, "Checkpoints to keep; never fewer than two.", minimum=2, panel=_RUN)
    resume: bool = option(False, "Go on from the newest good checkpoint of --out-dir.", panel=_RUN)
    resume_from: Path | None = option(None, "Go on from exactly this checkpoint.", metavar="STEP_DIR", panel=_RUN)
    auto_resume: bool = option(False, "Go on if there is a checkpoint, otherwise start afresh and say so.", panel=_RUN)
    allow_change: tuple[str, ...] = option((), "A setting that may differ from the resumed run's.", metavar="KEY", panel=_RUN)
    nonfinite: str = option("stop", "On a loss or gradient that is not finite: stop, or skip:K to leave out up to K steps.", panel=_RUN)
    on_spike: str = option(
        "ignore",
        "On a loss far above the last ones: ignore it, or rewind to the last checkpoint and leave out the data since.",
        choices=("ignore", "rewind"),
        panel=_RUN,
    )
    on_full: str = option(
        "fail", "When the disk is full at a save: fail, or wait for room and try again.", choices=("fail", "wait"), panel=_RUN
    )
    dry_run: bool = option(False, "Show the plan and stop before the first step.", panel=_RUN)
    plan_for: str | None = option(
        None, "With --dry-run: memory and time on machines you do not have, as 8xH100, arranged by --mesh.", metavar="GPUS", panel=_RUN
    )
    log: tuple[str, ...] = option(
        (),
        "Give the run's numbers to this as well; repeatable. codecarbon measures energy. Each is an extra: llmctl[NAME].",
        choices=("tensorboard", "wandb", "mlflow", "trackio", "codecarbon"),
        panel=_WATCH,
    )
    report: tuple[Path, ...] = option(
        (), "Train nothing: write an HTML report on this run folder; repeatable, to lay runs over each other.", metavar="RUN", panel=_WATCH
    )
    report_file: Path | None = option(None, "Where --report writes. [default: report.html in the first RUN]", metavar="FILE", panel=_WATCH)

    device: str = option("auto", "Where to train.", choices=("auto", "cpu", "cuda", "mps"), panel=_MACHINE)
    dtype: str = option(
        "auto", "Arithmetic; float32 masters are kept either way.", "--precision", choices=("auto", "bf16", "f32"), panel=_MACHINE
    )
    gradient_checkpointing: bool = option(
        False, "Keep less for the backward pass and compute it a second time: less memory, about a third more time.", panel=_MACHINE
    )
    compile: str = option(
        "auto",
        "torch.compile of the layers. auto: on an accelerator, when the run is expected to take at least 10 minutes.",
        choices=("auto", "on", "off"),
        panel=_MACHINE,
    )
    profile: bool = option(False, "Write where the time of a step goes into profile.json, and tell it at the end.", panel=_MACHINE)
    threads: int | None = option(None, "CPU threads. [default: as torch chooses]", minimum=1, maximum=1024, panel=_MACHINE)

    nproc: int | None = option(
        None,
        "Processes of this machine to train with, one a GPU; torchrun starts them on several. [default: 1]",
        minimum=1,
        maximum=1024,
        panel=_MACHINE,
    )
    mesh: str | None = option(
        None,
        "How the processes share the work: dp=2,fsdp=4,tp=1 is two copies of the model, each spread over four. [default: dp alone]",
        metavar="SHAPE",
        panel=_MACHINE,
    )
    offload: bool = option(False, "With fsdp: keep masters and optimizer in the CPU's memory, not the GPU's.", panel=_MACHINE)
    rank_timeout: float = option(
        25.0, "Seconds that a process waits for another in a step before it gives up.", metavar="SECONDS", above=0, panel=_MACHINE
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, str | Path):  # one folder, from Python
            object.__setattr__(self, "data", (Path(self.data),))
        check_fields(self)
        parse_mixture(self.data)
        given = [f"--{n.replace('_', '-')}" for n in ("max_steps", "max_tokens", "epochs", "max_time") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: give one budget, not {len(given)}")
        sources = [f"--{n.replace('_', '-')}" for n in ("depth", "model_config", "model") if getattr(self, n) is not None]
        if len(sources) > 1:
            raise UsageError(f"{' and '.join(sources)}: the architecture comes from one of them")
        if self.init_embeddings is not None and self.model is not None:
            raise UsageError("--init-embeddings does not go with --model, whose weights bring their embeddings")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise UsageError(f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}")
        if sum((self.resume, self.auto_resume, self.resume_from is not None)) > 1:
            raise UsageError("--resume, --resume-from and --auto-resume: give one of them")
        if self.report_file is not None and not self.report:
            raise UsageError("--report-file does not go without --report RUN")
        if self.plan_for is not None and not self.dry_run:
            raise UsageError("--plan-for: a plan for other machines; give --dry-run with it")
        mesh = parse_mesh(self.mesh, num_processes=self.nproc)
        if self.async_save and self.on_full == "wait":
            raise UsageError("--async-save does not go with --on-full wait, which stops the training")
        if self.offload and not mesh.shards:
            raise UsageError("--offload: give a --mesh with fsdp, whose parts of the model can wait in the CPU's memory")
        if self.max_time is not None:
            seconds(self.max_time, flag="--max-time")
        skips_allowed(self.nonfinite)


def seconds(text: str, *, flag: str) -> float:
    """ "90", "90s", "30m", "1.5h" or "2d" in seconds. Raises UsageError that names `flag`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    try:
        result = float(number) * unit
    except ValueError:
        result = -1.0
    if not 0 < result < 1e9:
        raise UsageError(f"{flag}: {text!r} is not a length of time; write it like 90s, 30m or 1.5h")
    return result


def skips_allowed(text: str) -> int:
    """How many steps `--nonfinite` lets a run leave out: "stop" is 0, "skip:K" is K. Raises UsageError."""
    if text == "stop":
        return 0
    word, _, number = text.partition(":")
    if word != "skip" or not number.isdecimal() or not 0 < int(number) < 1 << 31:
        raise UsageError(f"--nonfinite: {text!r} is neither stop nor skip:K with a whole K from 1 on")
    return int(number)
