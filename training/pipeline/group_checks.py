"""What has to fit where whole episodes are played in groups, and how large an update may be: checked at the start."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from training.algorithms.base import Algorithm
from training.pipeline.judging import GroupError
from vla.errors import SimrealError

if TYPE_CHECKING:
    from training.pipeline.placement import PlacementConfig


def settled(placement: "PlacementConfig", algorithm: Algorithm, slots: int) -> "PlacementConfig":
    """With the fragments of an update that the groups of an iteration are."""
    if placement.schedule != "asynchronous" or not algorithm.groups:
        return placement
    at_a_time = groups_of_a_lane(placement, algorithm, slots)
    each, rest = divmod(algorithm.groups, at_a_time)
    if rest:
        raise GroupError(
            f"{algorithm.groups} groups can't be played in fragments of {at_a_time}", code="GROUPS",
            remedy="Make algorithm.groups a multiple of slots / (environment_workers x lanes x group_size).",
        )  # fmt: skip
    if placement.fragments_per_update not in (None, each):
        raise GroupError(
            f"fragments_per_update is {placement.fragments_per_update}, and {algorithm.groups} groups are {each}",
            code="GROUPS", remedy="Set placement.fragments_per_update=null: algorithm.groups says how many.",
        )  # fmt: skip
    return replace(placement, fragments_per_update=each)


def groups_of_a_lane(placement: "PlacementConfig", algorithm: Algorithm, slots: int) -> int:
    """Groups in a fragment: as many as the environments of a lane play at a time, or one that they play in turns."""
    return max(1, slots // max(1, placement.all_lanes) // algorithm.group_size)


def check_slots(slots: int, algorithm: Algorithm, placement: "PlacementConfig", learners: int) -> None:
    """Synchronous: refuse groups that don't fit the environments of a worker."""
    size, groups, workers = algorithm.group_size, algorithm.groups, placement.environment_workers
    parts = {len(part) for part in np.array_split(np.arange(slots), workers)}
    if wrong := sorted(part for part in parts if part % size):
        raise GroupError(
            f"an environment worker has {wrong[0]} of {slots} environments, which groups of {size} don't divide",
            code="GROUPS", remedy=f"Make slots a multiple of {size * workers}, environment_workers x group_size.",
        )  # fmt: skip
    if groups * size < slots:
        raise GroupError(
            f"{groups} groups of {size} episodes leave some of {slots} environments without any", code="GROUPS",
            remedy=f"Raise algorithm.groups to {slots // size} or more, or lower slots.",
        )  # fmt: skip
    _check_learners(algorithm, learners)


def check_lanes(slots: int, algorithm: Algorithm, placement: "PlacementConfig", learners: int) -> None:
    """Asynchronous: refuse groups that don't fit the environments of a lane."""
    if algorithm.batch_size is not None:
        raise GroupError(
            "batch_size is for the synchronous schedule: fragments come one by one", code="BATCH",
            remedy="Set algorithm.batch_size=null and algorithm.minibatches.",
        )  # fmt: skip
    size, each = algorithm.group_size, slots // max(1, placement.all_lanes)
    if algorithm.groups and each and each % size and size % each:
        raise GroupError(
            f"a lane has {each} environments, which groups of {size} don't divide", code="GROUPS",
            remedy=f"Make slots a multiple of {size * placement.all_lanes}, lanes x group_size, or lower group_size.",
        )  # fmt: skip
    if algorithm.groups:
        _check_learners(algorithm, learners)


def _check_learners(algorithm: Algorithm, learners: int) -> None:
    left = 1 if algorithm.filters else algorithm.groups
    if left * algorithm.group_size < learners:
        raise GroupError(
            f"{left} groups of {algorithm.group_size} may be all that is left to learn from, too few for {learners} "
            "learners", code="GROUPS", remedy="Raise algorithm.group_size, or lower placement.learners.",
        )  # fmt: skip


def check_rows(
    slots: int, decisions: int, longest: int, algorithm: Algorithm, placement: "PlacementConfig"
) -> None:  # fmt: skip
    """Refuse a rollout that can't hold whole episodes. longest: decisions of one that lasts until its time limit."""
    played = algorithm.groups * algorithm.group_size
    if placement.schedule == "asynchronous":
        slots = slots // placement.all_lanes
        played = max(slots, algorithm.group_size)
    each = -(-played // slots)
    if decisions < each * longest:
        raise GroupError(
            f"{decisions} decisions are too few for {each} whole episodes of {longest} decisions in every slot",
            code="GROUPS", remedy=f"Set decisions={each * longest}: rows that stay empty cost memory alone.",
        )  # fmt: skip


def check_batch(algorithm: Algorithm, placement: "PlacementConfig", most: int, learners: int) -> None:
    """Synchronous: refuse updates smaller than a micro-batch. most: samples of an iteration, if none is left out."""
    micro, batch = placement.samples_at_a_time, algorithm.batch_size
    each = most // algorithm.minibatches if batch is None else batch
    if micro is not None and each < micro * learners:
        what = "algorithm.batch_size" if batch is not None else "slots or decisions"
        raise SimrealError(
            f"an update has {each} samples at most, fewer than a micro-batch of {micro} on each of {learners} learners",
            code="BATCH", remedy=f"Lower placement.micro_batch to {max(1, each // learners)}, or raise {what}.",
        )  # fmt: skip
    if batch is not None and batch > most:
        raise SimrealError(
            f"an iteration has {most} samples at most, fewer than batch_size {batch}", code="BATCH",
            remedy="Lower algorithm.batch_size, or raise slots or decisions.",
        )  # fmt: skip
