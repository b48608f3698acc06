"""Finds a checkpoint: a local directory, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.safetensors import check_has_weights

# Configs, tokenizers, weights. No pickles and no code: neither is ever run. No subfolders: some repositories keep the
# original weights there, once more.
FILES = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
SUBFOLDERS = ("*/*",)
TIMEOUT_S = 10.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The local directory of a checkpoint. A hub id is downloaded to the hub client's cache, or found there.

    Args:
      revision: branch, tag or commit of a hub id; its main branch if None.

    Raises:
      CheckpointError: there is no such directory or hub id, the hub cannot be reached, or there are no safetensors.
    """
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        check_has_weights(directory)
        return directory
    if directory.exists():
        raise CheckpointError(
            f"expected a directory with config.json and safetensors, got the file {directory}: pass its directory"
        )
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"expected a local directory or a hub id such as Qwen/Qwen3-30B-A3B, got {name!r}: no such directory"
        )
    directory = _downloaded(name, revision)
    check_has_weights(directory)
    return directory


def _downloaded(hub_id: str, revision: str | None) -> Path:
    # Asked here and not by `snapshot_download`, which would wait for a silent server for ever.
    try:
        commit = huggingface_hub.HfApi().repo_info(hub_id, revision=revision, timeout=TIMEOUT_S).sha
    except GatedRepoError as error:
        raise _not_found(hub_id, "its terms must be accepted on its page, and then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise _not_found(hub_id, "the hub has none (a private one needs `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise _not_found(hub_id, f"the hub's has no revision {revision!r}") from error
    # Sockets, proxies, HTTP errors, offline mode: whatever fails in the client or below it, the cache may have the files.
    except Exception as unreachable:
        try:
            return _snapshot(hub_id, revision, local_files_only=True)
        except LocalEntryNotFoundError:
            reason = f"{type(unreachable).__name__}: {str(unreachable).strip().partition(chr(10))[0]}"
            raise _not_found(
                hub_id, f"it is not in the hub client's cache and the hub cannot be reached ({reason})"
            ) from unreachable
    return _snapshot(hub_id, commit)


def _snapshot(hub_id: str, revision: str | None, *, local_files_only: bool = False) -> Path:
    path = huggingface_hub.snapshot_download(
        hub_id,
        revision=revision,
        allow_patterns=list(FILES),
        ignore_patterns=list(SUBFOLDERS),
        etag_timeout=TIMEOUT_S,
        local_files_only=local_files_only,
    )
    return Path(path)


def _not_found(hub_id: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"expected a local directory or a hub id, got {hub_id!r}: no such directory here, and {reason}. "
        f"Try a directory with config.json and model.safetensors, or `hf download {hub_id}` with a network: "
        "what is in the hub client's cache loads without one"
    )
