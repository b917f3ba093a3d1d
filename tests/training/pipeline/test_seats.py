"""Who sits where: words of a placement, what is refused, and every placement that is shipped."""

from pathlib import Path

import pytest

from training.pipeline.seats import Cluster, SeatError, Seats, check, seat
from training.plan import PlanConfig
from vla import configuration

EIGHT = Cluster(2, 4)


def words(environments: str = "cpu", policy: str = "cpu", learner: str = "cpu") -> dict[str, str]:
    return {"environments": environments, "policy": policy, "learner": learner}


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu", ()),
        ("all", tuple(range(8))),
        ("3", (3,)),
        ("0-2", (0, 1, 2)),
        ("6,0-1", (0, 1, 6)),
        ("0-50%", (0, 1, 2, 3)),
        ("75-100%", (6, 7)),
    ],
)
def test_words_name_devices_through_all_nodes(text: str, devices: tuple[int, ...]) -> None:
    assert seat(words(policy=text), EIGHT) == Seats((), devices, ())


@pytest.mark.parametrize(
    ("text", "cluster", "code"),
    [
        ("8", EIGHT, "PLACEMENT_GPU"),
        ("0-8", EIGHT, "PLACEMENT_GPU"),
        ("gpu", EIGHT, "PLACEMENT_GPU"),
        ("0-30%", EIGHT, "PLACEMENT_GPU"),
        ("50-150%", EIGHT, "PLACEMENT_GPU"),
        ("0-0%", EIGHT, "PLACEMENT_EMPTY"),
        ("3-1", EIGHT, "PLACEMENT_EMPTY"),
        ("all", Cluster(1, 0), "PLACEMENT_GPU"),
    ],
)
def test_devices_that_are_not_there_are_refused(text: str, cluster: Cluster, code: str) -> None:
    with pytest.raises(SeatError) as caught:
        seat(words(learner=text), cluster)
    assert caught.value.code == code and "learner" in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("seats", "stages", "is_asynchronous", "offload"),
    [
        (Seats((0,), (0,), (0,)), 2, False, True),  # stages can't overlap on one device
        (Seats((0, 1), (1, 2), ()), 1, False, False),  # device 0 waits for device 1
        (Seats((0,), (1,), (1,)), 1, True, False),  # the learner never rests
        (Seats((0,), (0,), (1,)), 1, True, False),
        (Seats((0,), (1,), (2,)), 1, False, True),  # nobody has to leave
    ],
)
def test_components_that_would_wait_for_each_other_are_refused(
    seats: Seats, stages: int, is_asynchronous: bool, offload: bool
) -> None:
    with pytest.raises(SeatError) as caught:
        check(seats, stages, is_asynchronous, offload, 8)
    assert caught.value.code == "PLACEMENT_OVERLAP" and caught.value.remedy


def test_what_overlaps_as_it_should_is_accepted() -> None:
    check(Seats((0,), (1,), (0, 1)), 2, False, True, 2)
    check(Seats((0,), (0,), (0,)), 1, False, True, 1)
    check(Seats((0,), (1,), (2,)), 2, True, False, 3)
    check(Seats((), (), ()), 4, True, False, 0)
    check(Seats((), (0,), (0,)), 1, True, False, 1)  # there is no other GPU


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (configuration.config_folder() / "placement").glob("*.yaml"))
)
def test_every_placement_that_is_shipped_seats_eight_gpus(name: str, tmp_path: Path) -> None:
    placement = configuration.load(PlanConfig, "plan", [f"placement={name}"]).placement
    seats = seat(words(placement.environments, placement.policy, placement.learner), Cluster(1, 8))
    check(seats, placement.stages, placement.schedule == "asynchronous", placement.offload, 8)
