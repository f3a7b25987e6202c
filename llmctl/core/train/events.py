"""What training tells: frozen events of plain numbers. Knows no tensor and draws nothing."""

from dataclasses import dataclass

from llmctl.core.data.mixture import SourceUse


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is about to be done, before the first step. Memory and time are estimates; the rest is exact."""

    num_parameters: int
    num_trained: int
    """As many of them, or of adapters' numbers beside them, as are trained."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    family: str
    data_tokens: int
    num_steps: int
    batch_tokens: int
    num_tokens: int
    epochs: float
    flops_per_token: float
    total_flops: float
    memory_bytes: int
    checkpoint_bytes: int
    matmul_peak_flops: float
    """FLOP/s of a large matrix product in the training dtype, measured just now."""
    estimated_s: float
    seq_len: int
    batch_size: int
    micro_batch_size: int
    warmup_steps: int
    learning_rate: float
    """Of AdamW, at the peak."""
    muon_learning_rate: float
    eval_every: int
    save_every: int
    sample_every: int
    dtype: str
    device: str
    threads: int
    seed: int
    run_dir: str | None
    sources: tuple[SourceUse, ...] = ()
    """What is taken of each source, where there are several."""


@dataclass(frozen=True, kw_only=True)
class PlannedElsewhere:
    """What the run would take on machines one does not have, by the cost model of cluster.py. Bytes are of one process."""

    gpus: str
    """As "8xH100"."""
    mesh: str
    fits: bool
    gpu_memory_bytes: float
    memory_bytes: float
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    other_bytes: float
    """What is gathered or on its way, and the runtime's own."""
    step_s: float
    compute_s: float
    communication_s: float
    waiting_s: float
    """The part of the communication that nothing hides."""
    tokens_per_second: float
    peak_share: float
    """FLOP/s of the model's arithmetic, as a part of the published peak."""
    num_steps: int
    total_s: float


@dataclass(frozen=True, kw_only=True)
class RowsReading:
    """Supervised rows are being read; so many were until now."""

    num_rows: int


@dataclass(frozen=True, kw_only=True)
class RowsRead:
    """Supervised rows are read, checked and packed; one event for the training rows, one for held-out ones."""

    split: str
    """ "train" or "val"."""
    num_rows: int
    num_skipped: int
    """Rows that break a rule, left out by --on-error skip."""
    num_examples: int
    num_cut: int
    num_dropped: int
    """Rows left out because they are too long, or have no answer token left."""
    num_tokens: int
    num_learned: int
    """Tokens with a loss."""
    num_sequences: int
    """Packed sequences in an epoch."""
    seq_len: int


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Training goes on from a checkpoint."""

    step: int
    num_steps: int
    tokens_seen: int
    path: str


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step. `loss` is the mean over the step's tokens, in nats, before the step's update."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    """Tokens with a loss in this step."""
    tokens_seen: int
    first_sample: int
    num_samples: int
    skipped: bool
    step_s: float
    tokens_per_second: float
    peak_share: float
    """FLOP/s of the model's arithmetic, as a part of the measured matmul peak."""
    elapsed_s: float
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """Loss on held-out data: nats a token, and bits a byte of the text (None when the bytes are not known)."""

    step: int
    loss: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None
    elapsed_s: float
    averaged: bool = False
    """Whether it is the loss of the weights' moving average rather than of the weights."""


@dataclass(frozen=True, kw_only=True)
class SampleDrawn:
    """A text that the model in training wrote; it begins with `prompt`."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: int
    path: str
    num_bytes: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """Where the time of the measured steps went; the same and more is in the file `path`."""

    num_steps: int
    elapsed_s: float
    """All of the measured time, evaluations and saving included."""
    step_s: float
    """Data, forward, backward, optimizer and logging of one step."""
    seconds: dict[str, float]
    """By phase, over all measured steps; what no phase covers is "other"."""
    matmul_peak_flops: float
    step_peak_share: float
    """FLOP/s of the model's arithmetic within steps, as a part of the measured matmul peak."""
    run_peak_share: float
    """The same over all of the measured time."""
    path: str


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something a person should know; training goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The budget is spent; the last checkpoint is `path`."""

    step: int
    tokens_seen: int
    loss: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    skipped_steps: int
    elapsed_s: float
    path: str


Event = (
    Planned
    | PlannedElsewhere
    | RowsReading
    | RowsRead
    | Resumed
    | StepDone
    | EvalDone
    | SampleDrawn
    | CheckpointSaved
    | Profiled
    | Warned
    | Finished
)
