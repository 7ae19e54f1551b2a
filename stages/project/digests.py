"""`sft code`: write digests of the code that each stage uses, so that DVC notices a new version of the package."""

from __future__ import annotations

from stages.checkout.code import DIGESTS, has_own_code, write_code_digests
from stages.checkout.paths import Paths


def run(paths: Paths) -> None:
    """Write the digests and print for which stages they differ from those before.

    Raises:
        ValueError: The folder is a checkout of the repository, or not a project.
    """
    if has_own_code(paths.root):
        raise ValueError(f"{paths.root} has its own code, which dvc.yaml lists; a project of `sft init` needs digests")
    if not (paths.root / "dvc.yaml").is_file():
        raise ValueError(f"{paths.root / 'dvc.yaml'} is missing; `sft init` makes a project")
    changed = write_code_digests(paths.root)
    print(f"{DIGESTS}: {', '.join(changed) if changed else 'no stage'} changed", flush=True)
