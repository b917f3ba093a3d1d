"""How often the shipped detector says of a rendered scene what the task's own predicate says.

    python benchmarks/detector.py [--scenes 20] [--size 64] [--out detector.json]

For each scene of each variant four ends: the object on the goal, where it was laid, beside the goal, and held over it.
The arm is at home in all of them. Where it hides the object, the detector can't tell.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
from deployment.franka import ArmConfig
from deployment.twin_view import SceneView
from vla import configuration
from vla.detector import by_colour
from vla.results import commit, machine, score, write_json
from vla.scene_picture import Viewpoint
from vla.tasks.put_on_plate import Episode, is_success, sample_episode
from vla.trial_protocol import FIRST_SEED, View

VARIANTS = (
    "in_distribution", "unseen_table", "unseen_object", "unseen_receptacle", "several_objects_seen",
    "distractor_receptacle", "unseen_position",
)  # fmt: skip
OPEN_M, HOLDING_M = 0.08, 0.045
End = tuple[str, tuple[float, float, float] | None, float]  # its name, where the object is, the gripper's width


def ends(scene: Episode, random: np.random.Generator) -> Iterator[End]:
    goal, item = scene.receptacles[0], scene.objects[0].item
    up, radius = item.half_height + 2 * goal.item.half_height, goal.item.radius
    inside, beside = 0.8 * radius * np.sqrt(random.uniform()), radius + item.radius + random.uniform(0.005, 0.03)
    (a, b) = random.uniform(0, 2 * np.pi, 2)
    yield "on the goal", (goal.x + inside * np.cos(a), goal.y + inside * np.sin(a), up), OPEN_M
    yield "where it was laid", None, OPEN_M
    yield "beside the goal", (goal.x + beside * np.cos(b), goal.y + beside * np.sin(b), item.half_height), OPEN_M
    yield "held over the goal", (goal.x, goal.y, up + 0.06), HOLDING_M


def measure(scenes: int, size: int) -> dict[str, Counter[str]]:
    """By end, and by variant: right, wrong, unsure."""
    nominal, random = View(), np.random.default_rng(0)
    view = Viewpoint(nominal.position, nominal.rotation_xyzw, nominal.fov_y_deg)
    robot = configuration.load(ArmConfig, "fr3", folder=configuration.config_folder() / "robot")
    home, seen = np.array(robot.home), SceneView(size)
    found: dict[str, Counter[str]] = {}
    for variant in VARIANTS:
        for seed in range(FIRST_SEED, FIRST_SEED + scenes):
            scene = sample_episode(seed, variant)
            before, target = seen.image(scene, None, home), scene.objects[0]
            for name, place, width in ends(scene, random):
                lies = np.array(place or (target.x, target.y, target.item.half_height))
                truth = is_success(scene, lies, 0.0, width, width == HOLDING_M)
                said = by_colour(before, seen.image(scene, place, home), scene, view, width).success
                word = "unsure" if said is None else "right" if said == truth else "wrong"
                for key in (name, variant, "all"):
                    found.setdefault(key, Counter())[word] += 1
    seen.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20, help="of each variant")
    parser.add_argument("--size", type=int, default=64, help="of the images, px")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = measure(given.scenes, given.size)
    for key, counts in found.items():
        print(f"{key:22} right {counts['right']:4}, wrong {counts['wrong']:3}, unsure {counts['unsure']:3}")
    sure = found["all"]["right"] + found["all"]["wrong"]
    result = {
        "scenes": given.scenes * len(VARIANTS), "size": given.size, "agreement": score(found["all"]["right"], sure),
        "counts": {key: dict(counts) for key, counts in found.items()}, "commit": commit(),
        "machine": machine("mujoco"),
    }  # fmt: skip
    print(json.dumps(result["agreement"]))
    if given.out is not None:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
