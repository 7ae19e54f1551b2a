"""Print for the configurations of a project which share of their keys `sft import` carries over.

    python benchmarks/imports.py axolotl FOLDER
    python benchmarks/imports.py llamafactory FOLDER --dataset-info dataset_info.json

A key counts as carried over if it has the same effect or is irrelevant. Configurations of other tasks than SFT are
listed and not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stages.importing.command import PEERS, as_params, import_configuration
from stages.importing.draft import Effect, Row, share


def main() -> None:
    """Import each file and print the share, the keys that are lost most often, and what could not be imported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset-info")
    arguments = parser.parse_args()
    rows: list[Row] = []
    refused: list[str] = []
    files = sorted(file for file in arguments.folder.iterdir() if file.suffix in (".yml", ".yaml", ".ipynb", ".py"))
    for file in files:
        try:
            draft = import_configuration(arguments.peer, [str(file)], dataset_info=arguments.dataset_info)
            as_params(draft)
        except ValueError as error:
            refused.append(f"{file.name}: {error}")
            continue
        rows += draft.rows
    count = len(files) - len(refused)
    print(f"{arguments.peer}: {count} configurations, {len(rows)} keys, {share(rows):.1%} carried over")
    for effect, count in Counter(row.effect for row in rows).most_common():
        print(f"  {effect.value}: {count}")
    lost = Counter(f"{row.key} ({row.note})" for row in rows if row.effect in (Effect.NEAREST, Effect.UNSUPPORTED))
    for text, count in lost.most_common(20):
        print(f"  {count:4} {text}")
    for text in refused:
        print(f"  not imported: {text}")


if __name__ == "__main__":
    main()
