"""A SentencePiece tokenizer inside a GGUF file, as a byte-fallback BPE of `tokenizers`. Knows GGUF's metadata; knows no tensor.

The file holds pieces and scores. SentencePiece's BPE joins, again and again, the two neighbours whose union is the piece of
the highest score; a list of merges, best first, says the same. It is built as transformers' converter builds it
(`generate_merges`), so that ids are equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.core.errors import InputError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
MAX_CHARS = 1 << 22
"""In all pieces together; Gemma's 262,144 have 1.5 million."""
MAX_PIECE_CHARS = 1 << 10
"""A piece is split at every place, at a cost that grows with the square of its length. Gemma's longest has 31 characters."""


def sentencepiece_backend(metadata: Mapping[str, Any], tokens: list[str], *, where: str) -> Any:
    """The backend of a tokenizer of the kind 'llama'. Raises InputError for scores that do not fit the tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        raise InputError(f"{where}: tokenizer.ggml.scores is missing or not a number for each of the {len(tokens)} tokens")
    longest, together = max(map(len, tokens), default=0), sum(map(len, tokens))
    if longest > MAX_PIECE_CHARS or together > MAX_CHARS:
        raise InputError(
            f"{where}: tokenizer.ggml.tokens has a piece of {longest:,} characters and {together:,} together;"
            f" at most {MAX_PIECE_CHARS:,} and {MAX_CHARS:,} are read"
        )
    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    if gemma:  # runs of spaces are written as such, though text is looked up with its spaces replaced
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))  # of two equal tokens the first counts
    # Gemma's scores do not follow its merges; the order of its pieces does
    ranks = [-float(i) for i in range(len(tokens))] if gemma else scores
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    name = tokens[unknown] if gemma and isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    try:
        model = models.BPE(vocab=vocab, merges=merges(vocab, tokens, ranks), unk_token=name, fuse_unk=True, byte_fallback=True)
        backend = Backend(model)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{where}: the tokenizer's pieces cannot be used: {error}") from error
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    elif metadata.get("tokenizer.ggml.add_space_prefix", True) is False:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges(vocab: Mapping[str, int], tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, the highest-ranked union first, of one union the longest left half first.

    Unions of equal rank are told apart by the lengths of their halves, then by the order of the pieces.
    """
    order = sorted(range(len(tokens)), key=lambda i: -ranks[i])
    found: list[tuple[str, str]] = []
    ranked: list[tuple[float, int]] = []  # of each token that is a union: its rank, and how many pairs give it
    for i in order:  # Gemma's 262,144 pieces can be cut in 1.2 million places: no calls of our own in here
        token, before = tokens[i], len(found)
        for cut in range(len(token) - 1, 0, -1):
            left = token[:cut]
            if left in vocab:
                right = token[cut:]
                if right in vocab:
                    found.append((left, right))
        if len(found) > before:
            ranked.append((ranks[i], len(found) - before))
    if len({rank for rank, _ in ranked}) < len(ranked):
        keys = [rank for rank, count in ranked for _ in range(count)]
        by_halves = sorted(zip(keys, found, strict=True), key=lambda item: (-item[0], -len(item[1][0]), -len(item[1][1])))
        return [pair for _, pair in by_halves]
    return found
