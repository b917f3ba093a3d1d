"""Put-on-plate in ManiSkill. Without the package, or without the suite's assets, these are skipped."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from training import envs
from training.demos import expert_of, record_episode, record_scenes
from training.envs.base import Demonstrable, EpisodeRequest, Scattered
from vla.errors import SimrealError
from vla.tasks.put_on_plate import ALL_VARIANTS, VARIANTS
from vla.tasks.put_on_plate_25 import OBJECTS

required = os.environ.get("CI") == "true" and sys.version_info < (3, 13)  # as in pyproject.toml
absent = importlib.util.find_spec("mani_skill") is None and not required
ASSETS = Path(os.environ.get("SIMREAL_ASSETS") or Path(__file__).parents[4] / "shared/assets")
pytestmark = pytest.mark.skipif(absent, reason="pip install 'simreal[maniskill]'")
needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(), reason="no assets of the 25-object suite: set SIMREAL_ASSETS, see docs/simulators/maniskill.md"
)
TASK = {
    "task": "PutOnPlate25-v1", "control_mode": "pd_ee_target_delta_pose", "max_translation": 0.02,
    "max_rotation": 0.05, "assets": str(ASSETS),
}  # fmt: skip


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    """From its state, chunks of one action, so that the expert can drive it."""
    made = envs.make("maniskill", 2, **TASK, chunk=1, reward="difference")
    yield made
    made.close()


@pytest.fixture(scope="module")
def seeing(rendering: Callable[..., Any]) -> Iterator[Any]:
    made = rendering(**TASK, chunk=4, reward="dense_difference")
    yield made
    made.close()


def play(env: Any, index: int, request: EpisodeRequest) -> tuple[bool, np.ndarray, bytes]:
    """Whether the expert succeeded, the rewards, and every bit of states and rewards."""
    env.reset(index, request)
    expert, rewards, heard = expert_of(env), [], []
    for _ in range(env.max_steps):
        result = env.step([index], expert.act(env.expert_view(index))[None, None])
        (seen,) = env.observe([index])
        rewards.append(result.rewards[0, 0])
        heard += [result.rewards, *seen.state.values(), env.privileged([index]), env.critic_state([index])]
        if result.terminated[0] or result.truncated[0]:
            break
    return bool(result.success[0]), np.array(rewards), b"".join(part.tobytes() for part in heard)


@needs_assets
def test_the_expert_succeeds_and_the_reward_counts_its_stages(env: Any) -> None:
    assert isinstance(env, Demonstrable) and isinstance(env, Scattered) and env.max_steps == 80
    outcomes = [play(env, 0, EpisodeRequest(seed)) for seed in (0, 3)]
    for success, rewards, _ in outcomes:
        assert success and rewards.dtype == np.float32
        assert set(np.unique(rewards.round(3))) >= {0.0, np.float32(0.1), np.float32(1.0)}
        assert rewards.sum() == pytest.approx(1.2, abs=1e-5)


@needs_assets
@pytest.mark.long
def test_the_expert_succeeds_in_nine_episodes_of_ten(env: Any) -> None:
    won = sum(play(env, 0, EpisodeRequest(seed))[0] for seed in range(100, 140))
    assert won >= 36, f"{won} of 40"


@needs_assets
def test_joints_are_solved_by_the_compiled_kinematics_whatever_else_is_installed(env: Any) -> None:
    solver = env.slots[0].env.agent.controller.controllers["arm"].kinematics.pmodel
    assert type(solver).__module__ == "sapien.pysapien_pinocchio"


def test_a_policy_that_does_nothing_or_the_wrong_thing_fails(env: Any) -> None:
    env.reset(0, EpisodeRequest(5))
    for _ in range(env.max_steps):
        result = env.step([0], np.zeros((1, 1, 7)))
    assert result.truncated[0] and not result.success[0] and not result.terminated[0]
    assert env.step([0], np.zeros((1, 1, 7))).executed.tolist() == [[False]]


@needs_assets
def test_the_same_request_is_the_same_episode_whatever_was_played_before(env: Any) -> None:
    first = play(env, 0, EpisodeRequest(1, "object_moved"))
    assert play(env, 0, EpisodeRequest(2, "several_objects_seen"))[2] != first[2]
    assert play(env, 0, EpisodeRequest(1, "object_moved"))[2] == first[2]
    assert play(env, 1, EpisodeRequest(1, "object_moved"))[2] == first[2]


@needs_assets
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_variant_is_laid_out_rendered_and_judged(seeing: Any, variant: str) -> None:
    seeing.reset(0, EpisodeRequest(11, variant))
    task = seeing.slots[0].env
    episode = task.episode
    assert episode.variant == variant and len(task.objects) == len(episode.objects)
    (seen,) = seeing.observe([0])
    image = seen.images["third_person"]
    assert image.shape == (64, 64, 3) and image.std() > 10 and seen.instruction == episode.instruction
    things = zip((*task.objects, *task.receptacles), (*episode.objects, *episode.receptacles), strict=True)
    for actor, placement in things:
        x, y, z = actor.pose.p[0].tolist()
        # What stands tall may fall over as it settles.
        assert np.hypot(x - placement.x, y - placement.y) < 0.07 and -0.01 < z < 0.09, actor.name
        assert np.isfinite(actor.linear_velocity).all() and float(actor.linear_velocity.norm()) < 0.02, actor.name
    before = np.array(task.objects[0].pose.p[0])
    for _ in range(2):
        result = seeing.step([0], np.tile([0, 0, 0, 0, 0, 0, 1.0], (1, 4, 1)))
    assert result.executed.all() and np.isfinite(result.rewards).all() and not result.success[0]
    moved = float(np.linalg.norm(np.array(task.objects[0].pose.p[0]) - before))
    assert moved > 0.1 if variant == "object_moved" else moved < 0.01


@needs_assets
def test_the_axes_are_those_of_the_tabletop(env: Any) -> None:
    assert env.axes == VARIANTS and env.controls == ("wrong_instruction",)
    assert len(env.instructions) == 16 and "put carrot on plate" in env.instructions


@needs_assets
def test_disturbed_pictures_differ_as_much_as_they_are_told_to(seeing: Any) -> None:
    task = seeing.slots[0].env
    seeing.reset(0, EpisodeRequest(4))
    clean = seeing.observe([0])[0].images["third_person"].astype(float)
    ids = (clean != np.asarray(table_picture(task))).any(-1)  # robot and things
    assert 0.02 < ids.mean() < 0.6
    changed = {}
    for kind in ("texture", "noise"):
        for strength, mix in (("weak", 0.3), ("strong", 0.5)):
            object.__setattr__(task.episode.disturbance, f"{kind}_mix", mix)
            seeing.slots[0].seen = None
            image = seeing.observe([0])[0].images["third_person"].astype(float)
            changed[kind, strength] = np.abs(image - clean)
        object.__setattr__(task.episode.disturbance, f"{kind}_mix", 0.0)
    for kind in ("texture", "noise"):
        assert 1 < changed[kind, "weak"].mean() < changed[kind, "strong"].mean() or kind == "texture"
        assert changed[kind, "weak"][ids].mean() < changed[kind, "strong"][ids].mean()
    assert changed["texture", "strong"][~ids].max() == 0 and (changed["noise", "strong"][~ids] > 0).mean() > 0.5


def table_picture(task: Any) -> np.ndarray:
    from training.envs.maniskill_tasks.assets import picture

    return picture(task.assets.table(task.episode.table), 64, 64)


@needs_assets
def test_training_draws_from_fewer_objects_and_tables_if_it_is_told_to() -> None:
    few = envs.make("maniskill", 1, **TASK, objects=2, tables=1)
    drawn = set()
    for seed in range(12):
        few.reset(0, EpisodeRequest(seed))
        episode = few.slots[0].env.episode
        drawn.add((episode.objects[0].item.name, episode.table))
    assert drawn == {(scan.name, 0) for scan in OBJECTS[:2]}
    few.reset(0, EpisodeRequest(0, "unseen_object"))
    assert few.slots[0].env.episode.objects[0].item in OBJECTS[16:]
    few.reset(0, EpisodeRequest(0, "several_objects_seen"))
    few.close()
    for settings, message in (({"objects": 1}, "2 to 16"), ({"tables": 17}, "1 to 16")):
        with pytest.raises(SimrealError, match=message):
            envs.make("maniskill", 1, **TASK, **settings)
    with pytest.raises(SimrealError, match="PickCube-v1 is not drawn from"):
        envs.make("maniskill", 1, objects=2)


@needs_assets
def test_keypoints_are_where_the_things_are_seen(seeing: Any) -> None:
    """The privileged pixel of the plate is on its colour, in front of whatever table."""
    seen_there = 0
    for seed in range(4):
        seeing.reset(0, EpisodeRequest(seed))
        image = seeing.observe([0])[0].images["third_person"]
        x, y = seeing.privileged([0])[0, -2:]
        column, row = (int((v + 1) / 2 * 64) for v in (x, y))
        seen_there += np.abs(image[row, column].astype(int) - [228, 248, 164]).max() < 30
    assert seen_there >= 3  # something may lie in front of it
    assert seeing.privileged([0]).shape == (1, seeing.privileged_size) == (1, 13)


@needs_assets
def test_a_chunk_is_rendered_once_and_a_picture_disturbs_nothing(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mani_skill.envs.scene import ManiSkillScene

    rendered: list[int] = []
    real = ManiSkillScene.update_render
    monkeypatch.setattr(ManiSkillScene, "update_render", lambda *a, **k: rendered.append(1) or real(*a, **k))
    seeing.reset(0, EpisodeRequest(2))
    seeing.step([0], np.tile([0.01, 0, 0, 0, 0, 0, 1.0], (1, 4, 1)))
    assert not rendered
    (seen,) = seeing.observe([0])
    seeing.observe([0])
    assert len(rendered) == 1
    picture = seeing.picture(0, 128)
    assert picture.shape == (128, 128, 3) and len(rendered) == 2
    small = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - seen.images["third_person"]).mean() < 12, "the same view"
    seeing.slots[0].seen = None
    assert (seeing.observe([0])[0].images["third_person"] == seen.images["third_person"]).all()


@needs_assets
def test_demonstrations_and_scattered_layouts(seeing: Any) -> None:
    episode = record_episode(seeing, EpisodeRequest(1_000_003), 8, 0.0, 0.0)
    assert episode is not None and episode["images"].shape[1:] == (1, 64, 64, 3)
    assert episode["actions"].shape[1:] == (4, 7) and episode["privileged"].shape[1:] == (13,)
    scenes = record_scenes(seeing, range(3), "in_distribution")
    assert np.ptp(scenes["state"][:, :3], axis=0).min() > 0.01 and len(set(scenes["instruction"])) > 1


@needs_assets
def test_a_camera_at_the_wrist_sees_the_table(rendering: Callable[..., Any]) -> None:
    env = rendering(**TASK, obs="rgb+state", image_size=32, chunk=1, robot="panda_wristcam")
    env.reset(0, EpisodeRequest(0))
    (seen,) = env.observe([0])
    assert set(seen.images) == {"third_person", "wrist"} and seen.images["wrist"].std() > 3
    assert {"obj_position", "goal_position", "commanded_position"} <= set(seen.state)
    env.close()


@needs_assets
def test_a_thing_that_has_fallen_off_the_table_spoils_no_sample(seeing: Any) -> None:
    import sapien
    import torch

    seeing.reset(0, EpisodeRequest(0))
    task = seeing.slots[0].suite
    with torch.inference_mode():
        task.objects[0].set_linear_velocity(torch.tensor([0.0, 0.0, -20.0]))
    for x, y, z in ((1.5, 0.0, -20.0), (*task.middle, -0.2)):  # far away; and behind the table, but in the image
        with torch.inference_mode():
            task.objects[0].set_pose(sapien.Pose([x, y, z]))
        told, critic = seeing.privileged([0])[0], seeing.critic_state([0])[0]
        assert np.isnan(told[:3]).all() and np.isnan(told[9:11]).all() and np.isfinite(told[3:9]).all()
        assert np.abs(critic).max() <= 10.0 and critic.shape == (seeing.critic_size,)


@needs_assets
def test_keypoints_of_the_wrist_are_where_its_camera_sees_the_things(rendering: Callable[..., Any]) -> None:
    env = rendering(**TASK, image_size=64, chunk=1, robot="panda_wristcam")
    assert env.privileged_size == 17
    found = []
    for seed in range(6):
        env.scatter(0, EpisodeRequest(seed))
        image = env.observe([0])[0].images["wrist"]
        x, y = env.privileged([0])[0, -2:]
        if np.isfinite([x, y]).all():
            column, row = (int((v + 1) / 2 * 64) for v in (x, y))
            found.append(image[row, column])
    plate = np.array(found, int)
    assert len(plate) >= 3 and (plate[:, 1] - plate[:, 2] > 40).sum() >= len(plate) - 1, plate  # it is yellow
    env.close()


@needs_assets
@pytest.mark.long
def test_memory_stays_flat_over_resets(env: Any) -> None:
    process, used = psutil.Process(), []
    for number in range(250):
        env.reset(0, EpisodeRequest(number, ALL_VARIANTS[number % len(ALL_VARIANTS)]))
        env.observe([0])
        used.append(process.memory_info().rss / 2**20)
    early, late = max(used[:50]), max(used[200:])
    assert late < early + 40, f"{early:.0f} MiB in the first 50 resets, {late:.0f} MiB after 200"


@needs_assets
def test_what_is_refused_changes_nothing(env: Any) -> None:
    env.reset(0, EpisodeRequest(1))
    state = env.slots[0].env.get_state()
    for actions, message in ((np.full((1, 1, 7), np.inf), "7 finite numbers"), (np.zeros((1, 1, 8)), "7 finite")):
        with pytest.raises(ValueError, match=message):
            env.step([0], actions)
    with pytest.raises(SimrealError, match="did you mean 'unseen_table'"):
        env.reset(0, EpisodeRequest(0, "unseen_tabel"))
    assert (env.slots[0].env.get_state() == state).all()


def test_without_the_assets_where_they_come_from_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIMREAL_ASSETS", raising=False)
    (tmp_path / "objects").mkdir()
    settings = {k: v for k, v in TASK.items() if k != "assets"}
    for more, message in (
        ({}, "no folder is named"), ({"assets": str(tmp_path / "none")}, "has no folder objects or more_carrot"),
        ({"assets": str(tmp_path)}, "lacks collision meshes of 001_carrot_simpler"),
    ):  # fmt: skip
        with pytest.raises(SimrealError, match=message) as caught:
            envs.make("maniskill", 1, **settings, **more)
        assert caught.value.code == "ASSETS_MISSING"
        assert "67 MB" in caught.value.remedy and "gen-robot/RL4VLA" in caught.value.remedy


@needs_assets
def test_what_does_not_go_together_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SimrealError, match="backend=cpu"):
        envs.make("maniskill", 1, **TASK, backend="gpu")
    from training.envs.maniskill_tasks.robots import PublishedWidowX

    monkeypatch.setattr(PublishedWidowX, "urdf_path", str(tmp_path / "absent.urdf"))
    with pytest.raises(SimrealError, match="download_asset widowx250s"):
        envs.make("maniskill", 1, **TASK, robot="widowx250s_put_on_plate")
