"""The plan of a run: the stages of dvc.yaml in topological order, read from DVC's index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.reproduce import plan_repro
from dvc.stage import PipelineStage, Stage

from sft.suggest import did_you_mean


class RunRefused(ValueError):
    """The arguments of a run are not valid; the message says why and what is valid."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of dvc.yaml.

    Args:
        name: The stage's name in dvc.yaml.
        upstream: Names of the stages whose outs it reads.
        params: Keys of params.yaml that it depends on, such as `train` or `model.dtype`.
        sources: Paths it depends on that no stage writes (code and data), relative to the root.
    """

    name: str
    upstream: frozenset[str]
    params: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Stages in topological order."""

    stages: tuple[PlannedStage, ...]

    @property
    def names(self) -> list[str]:
        """The stages' names in topological order."""
        return [stage.name for stage in self.stages]

    def between(self, first: str | None, last: str | None) -> Plan:
        """Return the part of the plan from one stage to another.

        Args:
            first: Keep this stage and those that depend on it; None keeps all.
            last: Keep this stage and those that it depends on; None keeps all.

        Raises:
            RunRefused: There is no such stage, or no stage remains.
        """
        for name in (first, last):
            if name is not None and name not in self.names:
                raise RunRefused(f"no stage {name!r} in dvc.yaml; {self._suggestion(name)}")
        kept = set(self.names)
        if first is not None:
            kept &= {name for name in self.names if first in self._needed_for(name)}
        if last is not None:
            kept &= self._needed_for(last)
        if not kept:
            raise RunRefused(f"there is no stage between {first!r} and {last!r}; the order is {', '.join(self.names)}")
        return Plan(tuple(stage for stage in self.stages if stage.name in kept))

    def inputs_from_outside(self, full: Plan) -> list[str]:
        """Return the stages of the full plan whose outs this part reads, but that are not in it."""
        wanted = {name for stage in self.stages for name in stage.upstream} - set(self.names)
        return [name for name in full.names if name in wanted]

    def _needed_for(self, name: str) -> set[str]:
        upstream = {stage.name: stage.upstream for stage in self.stages}
        found: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting.extend(upstream.get(current, ()))
        return found

    def _suggestion(self, name: str) -> str:
        return did_you_mean(name, self.names, otherwise=f"the stages are {', '.join(self.names)}")


def read_plan(root: Path) -> Plan:
    """Read the graph of stages from DVC's index, without locking or writing anything.

    Raises:
        RunRefused: `root` is not a DVC project, or dvc.yaml is not valid.
    """
    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph
            stages = [stage for stage in plan_repro(graph) if _is_planned(stage)]
            return Plan(tuple(_planned(stage, list(graph.successors(stage)), root) for stage in stages))
    except DvcException as error:
        raise RunRefused(f"{root}: {' '.join(str(error).split())}") from error


def _is_planned(stage: Stage) -> bool:
    """Return whether a run has the stage; it has not the one that writes digests, which `prepare_run` does itself."""
    return isinstance(stage, PipelineStage) and not stage.always_changed


def _planned(stage: PipelineStage, upstream: list[Stage], root: Path) -> PlannedStage:
    made = [Path(out.fs_path) for other in upstream if _is_planned(other) for out in other.outs]
    params: list[str] = []
    sources: list[str] = []
    for dependency in stage.deps:
        path = Path(dependency.fs_path)
        if isinstance(dependency, ParamsDependency):
            # a stage that depends on all of params.yaml uses the section of its name
            params.extend(dependency.params or [stage.name])
        elif not any(path == out or out in path.parents for out in made):
            sources.append(str(path.relative_to(root)) if path.is_relative_to(root) else str(path))
    names = frozenset(other.name for other in upstream if isinstance(other, PipelineStage) and _is_planned(other))
    return PlannedStage(stage.name, names, tuple(params), tuple(sources))
