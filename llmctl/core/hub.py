"""Models of the Hugging Face hub, through huggingface_hub and its ordinary cache. Knows names and files; loads nothing."""

import os
import re
from pathlib import Path

from llmctl.core.errors import NotFoundError

FILES = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""What a model needs of its repository: no pickles, no code, no weights of other frameworks."""
CONNECT_TIMEOUT_S = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(@[\w.\-/]+)?")


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form ORG/NAME or ORG/NAME@revision."""
    return _HUB_ID.fullmatch(reference) is not None and ".." not in reference


def fetch_model(reference: str) -> Path:
    """The folder in the hub's cache that holds the model's files; downloaded when they are not there.

    Raises NotFoundError in one line when the hub does not have it, does not show it to us, or cannot be reached: there
    is one quick try, not minutes of them.
    """
    repository, _, revision = reference.partition("@")
    # huggingface_hub reads these when it is imported
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(CONNECT_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(*, local_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(FILES),
                local_files_only=local_only,
                etag_timeout=CONNECT_TIMEOUT_S,
            )
        )

    try:
        found = snapshot(local_only=True)
        if any((found / name).is_file() for name in FILES[:2]) and any(found.glob("*.safetensors")):
            return found
    except LocalEntryNotFoundError:
        pass
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise NotFoundError(f"model {reference!r} not found locally, offline (HF_HUB_OFFLINE is set); give a directory or go online")
    try:
        return snapshot(local_only=False)
    except GatedRepoError as error:
        raise NotFoundError(f"model {reference!r} is gated: accept its terms on huggingface.co and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"model {repository!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"model {reference!r} not found: no such directory, and the hub has none that we may see") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise NotFoundError(f"model {reference!r} not found locally, and the hub answered {status}; try again later") from error
    except (LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise NotFoundError(
            f"model {reference!r} not found locally, offline: the hub cannot be reached ({type(error).__name__})"
        ) from error
