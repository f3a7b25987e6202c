"""One config truth: frozen dataclasses whose fields are the flags, the config-file keys and the environment overrides.

A package rather than one file because six commands' fields do not fit one: `fields` declares a field, `resolve` merges
the four layers, `model` holds the architecture facts, and each command has a module of its own. Stdlib only.
"""

from llmctl.core.config.fields import check_fields, option
from llmctl.core.config.model import ModelConfig
from llmctl.core.config.resolve import Resolved, resolve

__all__ = ["ModelConfig", "Resolved", "check_fields", "option", "resolve"]
