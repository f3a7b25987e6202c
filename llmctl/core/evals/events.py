"""What evaluation tells: frozen events of plain values. Knows no tensor and draws nothing."""

from dataclasses import dataclass

from llmctl.core.evals.metrics import Metric


@dataclass(frozen=True, kw_only=True)
class ModelReady:
    """The model is loaded. `sha256` covers weights, config and tokenizer files."""

    path: str
    sha256: str
    num_parameters: int
    dtype: str
    device: str
    threads: int
    context_size: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What one task or text will take. `num_total` is None where texts are read as they come."""

    name: str
    num_items: int | None
    num_total: int | None
    num_reused: int
    """Units whose scores an earlier run of the same command has left."""


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """Units (items of a task, windows of a text) done so far, those reused included."""

    name: str
    num_done: int
    num_total: int | None


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that the user should know and that is no error."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ItemScored:
    """One item of a task, in the order of the data. Log-likelihoods are in nats."""

    task: str
    index: int
    line: int
    prompt: str
    choices: tuple[str, ...]
    gold: int
    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    num_cut_tokens: int
    values: dict[str, float]
    """Metric name -> this item's number."""


@dataclass(frozen=True, kw_only=True)
class TaskScored:
    """The scores of a task and what they were made from."""

    name: str
    metrics: tuple[Metric, ...]
    num_items: int
    num_fewshot: int
    seed: int
    num_cut_items: int
    """Items whose prompt did not fit the context and was cut on the left."""
    num_cut_tokens: int
    bos: str | None
    context_size: int
    data_path: str
    data_sha256: str
    task_path: str
    task_sha256: str
    num_computed: int
    num_reused: int


@dataclass(frozen=True, kw_only=True)
class TextScored:
    """Perplexity and bits per byte of a text, and the definition behind the numbers."""

    name: str
    metrics: tuple[Metric, ...]
    definition: str
    num_documents: int
    num_tokens: int
    """All tokens read."""
    num_scored_tokens: int
    num_scored_bytes: int
    """UTF-8 bytes that the scored tokens stand for."""
    nll_nats: float
    """Summed negative log-likelihood of the scored tokens."""
    context_size: int
    stride: int
    bos: str | None
    num_windows: int
    num_computed: int
    num_reused: int


Event = ModelReady | Planned | Progressed | Warned | ItemScored | TaskScored | TextScored
Scored = TaskScored | TextScored
