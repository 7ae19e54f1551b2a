"""Full disk: `sudo python -m benchmarks.reliability.full_disk --count 20 --seed 1`.

A checkout lies on a small file system, which is filled up to a random number of bytes before `dvc repro` begins. The
run must end with one message that names the full disk, without a traceback; after the file that fills it is deleted,
the next run must complete, with outputs that equal those of a run without a full disk bit for bit. Only root can mount
the file system.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.reliability import record
from benchmarks.reliability.kills import outputs
from tests.test_pipeline import call, environment, make_project

SAID = re.compile(r"no space left|disk is full|Disk quota|not enough (free )?space|free space", re.IGNORECASE)


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder, rounded up to pages as a file system stores them."""
    return sum(-(-file.lstat().st_size // 4096) * 4096 for file in folder.rglob("*") if not file.is_dir())


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--more", action="store_true", help="count in addition to what is recorded")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="sft-full-") as name:
        folder = Path(name)
        fresh = make_project(folder / "fresh")
        whole = shutil.copytree(fresh, folder / "whole", symlinks=True)
        call(whole, "dvc", "repro")
        before, needed, expected = size_of(fresh), size_of(whole), outputs(whole)
        stages, faults = Counter[str](), list[str]()
        for _ in range(args.count):
            room = rng.randrange(4096, max(8192, needed - before))
            stage, found = at_point(folder, fresh, room, before, needed, expected)
            stages[stage] += 1
            faults += found
            print(f"{room} bytes of room: {stage}; wrong: {found}", flush=True)
    for stage, number in sorted(stages.items()):
        record.add("full_disk", stage, {"points": number}, more=args.more)
    record.add("full_disk", "all", {"points": args.count, "faults": len(faults), "seed": args.seed}, more=args.more)


def at_point(
    folder: Path, fresh: Path, room: int, before: int, needed: int, expected: dict[str, bytes]
) -> tuple[str, list[str]]:
    """Run the pipeline with so many bytes of room; return the stage that it ended in, and what was wrong."""
    disk = folder / "disk"
    disk.mkdir()
    size = needed + (64 << 20)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False)
    if mounted.returncode:
        raise SystemExit("only root can mount a small file system")
    try:
        project = shutil.copytree(fresh, disk / "project", symlinks=True)
        free = shutil.disk_usage(disk).free
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(max(0, free - room)))
        done = subprocess.run(
            ["dvc", "repro"], cwd=project, env=environment(), capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        running = re.findall(r"Running stage '(\w+)'", text)
        stage = running[-1] if running else "before the first stage"
        faults = []
        if done.returncode != 0:
            if not SAID.search(text):
                faults.append(f"{stage}: the message does not name the full disk: {text[-600:]}")
            if "Traceback" in text:
                faults.append(f"{stage}: a traceback: {text[-3000:]}")
        else:
            stage = "complete"
        ballast.unlink()
        again = subprocess.run(
            ["dvc", "repro"], cwd=project, env=environment(), capture_output=True, text=True, check=False
        )
        if again.returncode != 0:
            faults.append(f"{stage}: the next run failed: {(again.stdout + again.stderr)[-1500:]}")
        else:
            found = outputs(project)
            faults += [f"{stage}: {name} differs" for name in expected if found.get(name) != expected[name]]
        return stage, faults
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


if __name__ == "__main__":
    main()
