"""What an export tells while it works: frozen, plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model is loaded."""

    path: str
    family: str
    num_parameters: int
    num_format: str


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that the user should know."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result was read back, before it got its name.

    Differences are the largest of any logit (of any number, for word vectors) over `num_tokens` tokens: of what `reader`
    reads from what was meant to be written, and of what was meant from the source, which is the price of rounding.
    """

    reader: str
    num_tokens: int
    largest_difference: float
    rounding_difference: float
    same_argmax: float
    """Share of places where the most likely token is the source's."""
    tokenizer_checked: bool


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result stands under its name."""

    path: str
    format: str
    num_format: str
    num_files: int
    num_bytes: int


Event = Opened | Warned | Verified | Written
