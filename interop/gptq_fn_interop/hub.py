"""Models by directory or by name on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*")
"""What a model needs here; pickled weights are never fetched."""


def local(model: str | Path, **options: Any) -> Path:
    """The directory of a model: itself, or where the hub's cache keeps it, fetched if need be.

    `options` are those of snapshot_download: revision, token, cache_dir, ... Raises ValueError, in a sentence, where it is
    neither a directory nor a model that can be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise ValueError(f"{model} is a file; give the directory of the model, or its name on the hub.")
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(PATTERNS), **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{model} is not a directory here, and no model of this name could be fetched from the hub: {reason.removeprefix('Got: ')}"
        ) from error
