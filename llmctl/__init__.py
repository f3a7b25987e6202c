"""llmctl: the whole life of a decoder-only language model from one command line."""

__version__ = "0.1.0"
