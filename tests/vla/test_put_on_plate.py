import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from vla.tasks.put_on_plate import (
    ALL_VARIANTS,
    CENTER,
    CLEARANCE,
    CONTROLS,
    MOVED_DISTANCE,
    PLATE,
    START_POSITION,
    TRAIN_HALF_EXTENT,
    TRAIN_OBJECTS,
    TRAIN_TABLES,
    TRAIN_TEMPLATES,
    UNSEEN_HALF_EXTENT,
    UNSEEN_OBJECTS,
    UNSEEN_RECEPTACLES,
    UNSEEN_TABLES,
    UNSEEN_TEMPLATES,
    VARIANTS,
    Disturbance,
    Episode,
    Item,
    Placement,
    axis_of,
    is_success,
    sample_episode,
    training_sentences,
)

SEEDS = range(60)
ITEMS = (*TRAIN_OBJECTS, *UNSEEN_OBJECTS, PLATE, *UNSEEN_RECEPTACLES)
DISTRACTORS = {"several_objects_seen": 3, "several_objects_unseen": 3}


def placements(episode: Episode) -> tuple[Placement, ...]:
    return (*episode.objects, *episode.receptacles)


def from_center(placement: Placement) -> float:
    """Half edge in m of the smallest centred square that holds the placement."""
    return max(abs(placement.x - CENTER[0]), abs(placement.y - CENTER[1]))


def reach(item: Item) -> float:
    """Horizontal extent in m of an item from its origin, from its parts."""

    def part_reach(kind: str, size: tuple[float, ...], x: float, y: float) -> float:
        if kind == "box":
            return float(np.hypot(abs(x) + size[0], abs(y) + size[1]))
        return float(np.hypot(x, y)) + size[0]

    return max(part_reach(p.kind, p.size, p.offset[0], p.offset[1]) for p in item.parts)


def distance(a: Placement, b: Placement) -> float:
    return float(np.hypot(a.x - b.x, a.y - b.y))


def test_numbers_of_the_published_suite() -> None:
    assert len(TRAIN_OBJECTS) == 16 and len(UNSEEN_OBJECTS) == 9
    assert len({i.name for i in (*TRAIN_OBJECTS, *UNSEEN_OBJECTS)}) == 25
    assert len({i.name for i in (PLATE, *UNSEEN_RECEPTACLES)}) == 17
    assert len(TRAIN_TABLES) == 16 and len(UNSEEN_TABLES) == 5 and len({*TRAIN_TABLES, *UNSEEN_TABLES}) == 21
    assert not set(TRAIN_TEMPLATES) & set(UNSEEN_TEMPLATES)


def test_unseen_objects_are_new_combinations_of_known_words() -> None:
    words = {word for item in TRAIN_OBJECTS for word in item.name.split()}
    assert {word for item in UNSEEN_OBJECTS for word in item.name.split()} == words


def test_every_variant_of_the_published_suite_exists() -> None:
    assert {axis: set(members) for axis, members in VARIANTS.items()} == {
        "in_distribution": {"in_distribution"},
        "vision": {
            "unseen_table",
            "dynamic_texture_weak",
            "dynamic_texture_strong",
            "dynamic_noise_weak",
            "dynamic_noise_strong",
        },
        "semantic": {
            "unseen_object",
            "unseen_receptacle",
            "unseen_instruction",
            "several_objects_seen",
            "several_objects_unseen",
            "distractor_receptacle",
        },
        "execution": {"unseen_position", "unseen_start_pose", "object_moved"},
    }
    assert all(axis_of(v) == axis for axis, members in VARIANTS.items() for v in members)
    assert [axis_of(v) for v in CONTROLS] == ["control"]
    assert (*itertools.chain(*VARIANTS.values()), *CONTROLS) == ALL_VARIANTS


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'unseen_tables'.*unseen_table"):
        sample_episode(0, "unseen_tables")


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_items_stand_on_their_lowest_part(item: Item) -> None:
    def half(kind: str, size: tuple[float, ...]) -> float:
        return size[0] if kind == "sphere" else size[-1]

    assert min(p.offset[2] - half(p.kind, p.size) for p in item.parts) == pytest.approx(-item.half_height)


def test_the_same_seed_gives_the_same_episode_in_every_process() -> None:
    code = (
        "import hashlib; from vla.tasks.put_on_plate import ALL_VARIANTS, sample_episode;"
        "print(hashlib.sha256(repr([sample_episode(s, v) for v in ALL_VARIANTS for s in range(20)])"
        ".encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    for _ in range(2):
        here = repr([sample_episode(s, v) for v in ALL_VARIANTS for s in range(20)])
        assert hashlib.sha256(here.encode()).hexdigest() == elsewhere
    assert len({repr(sample_episode(seed)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_layouts_have_room_and_stay_in_range(variant: str) -> None:
    for seed in SEEDS:
        episode = sample_episode(seed, variant)
        assert (episode.seed, episode.variant) == (seed, variant)
        assert len(episode.objects) == 1 + DISTRACTORS.get(variant, 1)
        assert len(episode.receptacles) == 1 + (variant == "distractor_receptacle")
        assert len({p.item.name for p in placements(episode)}) == len(placements(episode))
        for a, b in itertools.combinations(placements(episode), 2):
            assert distance(a, b) >= a.item.radius + b.item.radius + CLEARANCE
            assert distance(a, b) > reach(a.item) + reach(b.item)
        for place in placements(episode):
            asked = variant == "unseen_position" and place in (episode.objects[0], episode.receptacles[0])
            low, high = (TRAIN_HALF_EXTENT, UNSEEN_HALF_EXTENT) if asked else (0.0, TRAIN_HALF_EXTENT)
            assert low <= from_center(place) <= high
            assert place.yaw % (np.pi / 4) == pytest.approx(0.0) and 0 <= place.yaw < np.pi


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_variant_changes_what_it_says_and_nothing_else(variant: str) -> None:
    offsets = []
    for seed in SEEDS:
        episode = sample_episode(seed, variant)
        target, goal = episode.objects[0].item, episode.receptacles[0].item
        assert target in (UNSEEN_OBJECTS if variant == "unseen_object" else TRAIN_OBJECTS)
        others = UNSEEN_OBJECTS if variant == "several_objects_unseen" else TRAIN_OBJECTS
        assert all(p.item in others for p in episode.objects[1:])
        assert goal in UNSEEN_RECEPTACLES if variant == "unseen_receptacle" else goal is PLATE
        assert all(p.item in UNSEEN_RECEPTACLES for p in episode.receptacles[1:])
        assert episode.table in (UNSEEN_TABLES if variant == "unseen_table" else TRAIN_TABLES)
        templates = UNSEEN_TEMPLATES if variant == "unseen_instruction" else TRAIN_TEMPLATES
        named = episode.objects[1].item if variant == "wrong_instruction" else target
        expected = {t.format(object=named.name, receptacle=goal.name) for t in templates}
        assert episode.instruction in expected
        offsets.append(np.abs(np.subtract(episode.start_position, START_POSITION)))
        mixes = {
            "dynamic_texture_weak": (0.3, 0.0),
            "dynamic_texture_strong": (0.5, 0.0),
            "dynamic_noise_weak": (0.0, 0.3),
            "dynamic_noise_strong": (0.0, 0.5),
        }
        happening = episode.disturbance
        assert (happening.texture_mix, happening.noise_mix) == mixes.get(variant, (0.0, 0.0))
        assert (happening.move_at_step is not None) == (variant == "object_moved")
    if variant == "unseen_start_pose":
        assert (np.min(offsets, axis=0) >= [0.04, 0.06, 0.04]).all()
        assert (np.max(offsets, axis=0) <= [0.08, 0.12, 0.08]).all()
    else:
        assert (np.max(offsets, axis=0) <= [0.03, 0.04, 0.03]).all()


def test_wrong_instruction_names_the_other_object() -> None:
    for seed in SEEDS:
        episode = sample_episode(seed, "wrong_instruction")
        assert episode.objects[0].item.name not in episode.instruction
        assert episode.objects[1].item.name in episode.instruction


def test_a_moved_object_lands_elsewhere_on_a_clear_spot() -> None:
    for seed in range(300):
        episode = sample_episode(seed, "object_moved")
        target, *others = placements(episode)
        happening = episode.disturbance
        assert happening.move_to is not None and happening.move_at_step == 5
        moved = dataclasses.replace(target, x=happening.move_to[0], y=happening.move_to[1])
        assert distance(moved, target) >= MOVED_DISTANCE
        assert from_center(moved) <= TRAIN_HALF_EXTENT
        for other in others:
            assert distance(moved, other) >= moved.item.radius + other.item.radius + CLEARANCE


def resting(**changes: object) -> bool:
    """`is_success` of a red cube let go on a plate, after some changes."""
    cube = next(i for i in TRAIN_OBJECTS if i.name == "red cube")
    goal = Placement(PLATE, 0.5, 0.1, 0.0)
    episode = Episode(
        0, "in_distribution", (Placement(cube, 0.4, 0.0, 0.0),), (goal,), 0, "", START_POSITION, (0, 0, 0),
        Disturbance(),
    )  # fmt: skip
    height = 2 * PLATE.half_height + cube.half_height
    scene: dict[str, object] = {
        "position": (0.5, 0.1, height),
        "speed": 0.0,
        "width": 0.08,
        "touching": False,
        **changes,
    }
    return is_success(
        episode, np.array(scene["position"]), scene["speed"], scene["width"], scene["touching"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "success"),
    [
        ({}, True),
        ({"position": (0.5, 0.1 + 0.054, 0.032)}, True),
        ({"position": (0.5 + 0.038, 0.1 + 0.038, 0.032)}, True),
        ({"position": (0.5, 0.1 + 0.056, 0.032)}, False),  # on the rim
        ({"position": (0.4, 0.0, 0.022)}, False),  # where it stood
        ({"position": (0.5, 0.1, 0.06)}, False),  # in the air, or on top of something
        ({"position": (0.5, 0.1, 0.015)}, False),  # fallen through
        ({"speed": 0.2}, False),
        ({"touching": True}, False),
        ({"width": 0.02}, False),
    ],
)
def test_success(changes: dict[str, object], success: bool) -> None:
    assert resting(**changes) is success


def test_training_sentences_hold_nothing_unseen() -> None:
    sentences = training_sentences()
    assert len(sentences) == len(set(sentences)) == len(TRAIN_TEMPLATES) * len(TRAIN_OBJECTS)
    unseen = [i.name for i in (*UNSEEN_OBJECTS, *UNSEEN_RECEPTACLES)]
    words = {sentence: f" {sentence} " for sentence in sentences}
    assert not any(f" {name} " in text for text in words.values() for name in unseen)
    assert {sample_episode(seed).instruction for seed in SEEDS} <= set(sentences)
