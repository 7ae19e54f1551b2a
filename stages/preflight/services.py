"""Checks of what lies elsewhere: the tracking store, the hub, names in the model registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from stages.models.base import EMBEDDED_PREFIX
from stages.models.resolve import KEY, NETWORK_ERRORS, look_up
from stages.params.schema import LoadSection, ModelSection, Params, PublishSection
from stages.preflight.findings import Problem
from stages.tracking.address import absolute_uri, check_database, database

DEMO_MODEL, DEMO_SOURCE = "shop-extractor", "data/shop_train.jsonl"
TIMEOUT_S = 5


def check_services(params: Params, home: Path, folder: Path | None) -> Iterator[Problem]:
    """Yield what can't be reached or is not what it seems.

    Args:
        params: Values of params.yaml.
        home: The main checkout.
        folder: Folder of the base model; None if it is not on this machine.
    """
    yield from _check_hub_model(params.model, home, folder)
    yield from _check_hub_sources(params.load)
    yield from _check_upload(params.publish)
    if params.publish.registered_model == DEMO_MODEL and all(
        source.path != DEMO_SOURCE for source in params.load.sources
    ):
        yield Problem(
            "publish.registered_model",
            f"{DEMO_MODEL!r} is the model of the shipped example; name your own, or it gets a version of yours",
        )


def check_tracking(section: PublishSection, home: Path) -> None:
    """Check that the tracking store can be reached and used.

    Raises:
        ValueError: It can't be used, or does not answer within 25 s.
    """
    if (file := database(absolute_uri(section.tracking_uri, home))) is not None:
        check_database(file)
        return
    from stages.tracking.store import check_store  # imports MLflow, which is slow, and most stores are files

    check_store(section, home)


def _check_hub_model(model: ModelSection, home: Path, folder: Path | None) -> Iterator[Problem]:
    name = model.name_or_path
    if folder is not None or name.startswith(EMBEDDED_PREFIX):
        return
    if is_offline_mode() or look_up(name, model.revision) is None:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub can't be reached"
        key = KEY.rpartition(" ")[2]
        yield Problem(
            key, f"{name!r} is not a folder and not in the hub's cache, and {why}; check the connection", is_error=True
        )


def _check_hub_sources(section: LoadSection) -> Iterator[Problem]:
    for number, source in enumerate(section.sources):
        if not source.hub or is_offline_mode():
            continue
        key = f"load.sources[{number}].path"
        try:
            HfApi().dataset_info(source.path, revision=source.revision, timeout=TIMEOUT_S)
        except GatedRepoError:
            yield Problem(key, f"{source.path!r} is gated: accept its terms on its hub page and log in", is_error=True)
        except RevisionNotFoundError:
            yield Problem(
                f"load.sources[{number}].revision", f"{source.path!r} has no {source.revision!r}", is_error=True
            )
        except RepositoryNotFoundError:
            text = f"there is no data set {source.path!r} on the hub (if it is private: `hf auth login`)"
            yield Problem(key, text, is_error=True)
        except NETWORK_ERRORS:
            yield Problem(key, f"the hub can't be reached to look up {source.path!r}")


def _check_upload(section: PublishSection) -> Iterator[Problem]:
    if section.push_to_hub is None:
        return
    if is_offline_mode():
        yield Problem("publish.push_to_hub", "HF_HUB_OFFLINE is set, so nothing can be uploaded", is_error=True)
    elif get_token() is None:
        yield Problem("publish.push_to_hub", "not logged in to the hub; type `hf auth login`", is_error=True)
