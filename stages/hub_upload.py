"""Push a model folder and its card to the hub, as one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path

KEY = "publish.push_to_hub"


def push(folder: Path, card: Path, repo_id: str, message: str) -> str:
    """Make the repository private where it does not exist, and have it hold just this folder and its card.

    Args:
        folder: Plain checkpoint.
        card: Becomes README.md.
        repo_id: `owner/name`.
        message: Of the commit.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The hub can't be reached or refuses; names the key.
    """
    # slow to import, and few runs push
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        with tempfile.TemporaryDirectory() as work:
            for file in [*folder.iterdir(), card]:
                (Path(work) / file.name).symlink_to(file.resolve())
            api.create_repo(repo_id, private=True, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=work, commit_message=message, delete_patterns="*")
    except LocalTokenNotFoundError:
        raise ValueError(f"{KEY} {repo_id!r}: nobody is logged in; type `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise ValueError(f"{KEY} {repo_id!r}: HF_HUB_OFFLINE is set; unset it, or set {KEY}: null") from None
    except (HTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{KEY} {repo_id!r}: the hub refused or can't be reached: {reason}") from error
    return str(commit.commit_url)
