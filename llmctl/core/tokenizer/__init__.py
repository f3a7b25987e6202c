"""Text to ids and back, chat templates, and the training of new tokenizers. Knows no model."""

from llmctl.core.tokenizer.chatml import CHATML_TEMPLATE, CHATML_TOKENS
from llmctl.core.tokenizer.intake import CorpusRead
from llmctl.core.tokenizer.stream import StreamDecoder
from llmctl.core.tokenizer.tokenizer import Tokenizer
from llmctl.core.tokenizer.train import TokenizerTrained, train_tokenizer

__all__ = ["CHATML_TEMPLATE", "CHATML_TOKENS", "CorpusRead", "StreamDecoder", "Tokenizer", "TokenizerTrained", "train_tokenizer"]
