"""Text to ids and back, chat templates, and the training of new tokenizers. Knows no model."""

from llmctl.core.tokenizer.stream import StreamDecoder
from llmctl.core.tokenizer.tokenizer import Tokenizer
from llmctl.core.tokenizer.train import CorpusRead, TokenizerTrained, train_tokenizer

__all__ = ["CorpusRead", "StreamDecoder", "Tokenizer", "TokenizerTrained", "train_tokenizer"]
