"""ManiSkill behind the interface of all simulators. Without the package these are skipped, but not in CI."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scipy.spatial.transform import Rotation

from training import envs
from training.envs.base import EpisodeRequest
from vla import options
from vla.checkpoint import load
from vla.errors import SimrealError

required = os.environ.get("CI") == "true" and sys.version_info < (3, 13)  # as in pyproject.toml
absent = importlib.util.find_spec("mani_skill") is None and not required
needs_maniskill = pytest.mark.skipif(absent, reason="pip install 'simreal[maniskill]'")


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    made = envs.make("maniskill", 2, chunk=5, control_mode="pd_ee_delta_pose")
    yield made
    made.close()


def play(env: Any, index: int, seed: int) -> tuple[bytes, bool]:
    """Every bit of states and rewards of an episode that carries the cube towards its goal; whether it was grasped."""
    env.reset(index, EpisodeRequest(seed))
    random = np.random.default_rng(seed)
    heard, grasped = [], False
    for t in range(36):
        (seen,) = env.observe([index])
        way = seen.state["tcp_to_obj_position"]
        target = 0.8 * way + random.normal(0, 0.004, 3) if t < 26 else 0.6 * seen.state["obj_to_goal_position"]
        action = np.zeros((1, 1, 7))
        action[..., :3], action[..., 6] = target.clip(-0.09, 0.09), t < 22 and np.linalg.norm(way) > 0.02
        result = env.step([index], action)
        heard += [*seen.state.values(), result.rewards, result.executed]
        grasped |= bool(seen.state["is_grasped"])
    return b"".join(part.tobytes() for part in heard), grasped


@needs_maniskill
def test_the_same_seed_is_the_same_episode_whatever_was_played_before(env: Any) -> None:
    first = play(env, 0, 1)
    assert first[1], "nothing was touched"
    for seed in (7, 4):
        assert play(env, 0, seed)[0] != first[0]
        assert play(env, 0, 1) == first
    assert play(env, 1, 1) == first
    assert env.contract.cameras == () and env.contract.action.control_mode == "delta_ee"


@needs_maniskill
def test_only_what_somebody_looks_at_is_computed(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(0, EpisodeRequest(1))
    native, calls = env.slots[0].env, []
    monkeypatch.setattr(native, "get_obs", lambda info: calls.append(1) or type(native).get_obs(native, info))
    env.observe([0])
    env.observe([0])
    assert len(calls) == 1, "what does not change is read once"
    result = env.step([0], np.zeros((1, 5, 7)))
    assert result.executed.all() and 0 < result.rewards.min() <= result.rewards.max() < 1 and len(calls) == 1
    env.observe([0])
    env.observe([0])
    assert len(calls) == 2


@needs_maniskill
@pytest.mark.parametrize("obs", ["rgb", "rgb+state"])
def test_a_chunk_is_rendered_once(obs: str, rendering: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = rendering(obs=obs, chunk=4)
    from mani_skill.sensors.camera import Camera

    pictures: list[int] = []
    monkeypatch.setattr(Camera, "capture", lambda self: pictures.append(1) or self.camera.take_picture())
    env.reset(0, EpisodeRequest(0))
    env.step([0], np.zeros((1, 4, 8)))
    assert not pictures
    (seen,) = env.observe([0])
    env.observe([0])
    env.step([0], np.zeros((1, 4, 8)))
    assert len(pictures) == 1
    assert seen.images["third_person"].shape == (64, 64, 3) and seen.images["third_person"].std() > 10
    assert ("obj_position" in seen.state) == (obs == "rgb+state")
    assert env.contract.cameras[0].fov_y_deg == pytest.approx(90) and env.contract.cameras[0].height == 64
    picture = env.picture(0, 96)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8 and picture.std() > 10
    env.close()


@needs_maniskill
def test_a_state_based_task_is_shown_to_people(env: Any, rendering: Callable[..., Any]) -> None:
    rendering().close()  # skips where nothing renders
    env.reset(0, EpisodeRequest(1))
    first = env.picture(0, 64)
    for _ in range(4):
        env.step([0], np.tile([0.03, 0.03, -0.02, 0, 0, 0, 1.0], (1, 5, 1)))
    state = env.slots[0].env.get_state()
    assert (np.abs(env.picture(0, 64).astype(int) - first).sum(-1) > 60).sum() > 20, "the arm moved"
    assert (env.slots[0].env.get_state() == state).all()


@needs_maniskill
@pytest.mark.parametrize("reward", ["difference", "dense_difference"])
def test_differences_of_the_reward_add_up(reward: str) -> None:
    dense, difference = (envs.make("maniskill", 1, chunk=6, reward=r) for r in ("dense", reward))
    actions = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 6, 8))
    for env in (dense, difference):
        env.reset(0, EpisodeRequest(3))
    begun = difference.slots[0].level
    levels, steps = dense.step([0], actions).rewards[0], difference.step([0], actions).rewards
    assert steps.dtype == np.float32 and np.allclose(begun + np.cumsum(steps[0]), levels, atol=1e-6)
    assert 0 < begun < 1 and np.ptp(steps) > 0
    dense.close(), difference.close()


@needs_maniskill
def test_the_controller_that_follows_a_pose_tells_it() -> None:
    env = envs.make("maniskill", 1, control_mode="pd_ee_target_delta_pose", chunk=4)
    env.reset(0, EpisodeRequest(2))
    (before,) = env.observe([0])
    env.step([0], np.tile([0.02, 0, 0, 0, 0, 0, 1.0], (1, 4, 1)))
    (after,) = env.observe([0])
    assert np.allclose(after.state["commanded_position"] - before.state["commanded_position"], [0.08, 0, 0], atol=1e-4)
    assert 0.04 < (after.state["eef_position"] - before.state["eef_position"])[0] < 0.081, "it lags"
    env.close()


@needs_maniskill
def test_a_refused_batch_changes_nothing(env: Any) -> None:
    env.reset(0, EpisodeRequest(1))
    state = env.slots[0].env.get_state()
    wrong = np.zeros((1, 5, 7))
    wrong[0, 4, 2] = np.nan
    for actions, message in ((wrong, "7 finite numbers"), (np.zeros((1, 5, 6)), "7 finite numbers"),
                             (np.zeros((2, 5, 7)), "2 rows of actions for 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            env.step([0], actions)
    assert env.slots[0].steps == 0 and (env.slots[0].env.get_state() == state).all()


@needs_maniskill
def test_the_batched_simulation_keeps_its_books_on_the_processor_too() -> None:
    """The class that a GPU runs, with the only number of environments that PhysX takes here."""
    from training.envs.maniskill import BatchedManiSkill, ManiSkill, ManiSkillConfig

    config = options.read(ManiSkillConfig, {"chunk": 5, "max_episode_steps": 7, "reward": "dense"})
    batch, single = BatchedManiSkill(1, config, "physx_cpu"), ManiSkill(1, config)
    assert batch.contract == single.contract
    actions = np.random.default_rng(1).uniform(-0.05, 0.05, (3, 1, 5, 8))
    with pytest.raises(ValueError, match="plays no episode"):
        batch.step([0], actions[0])
    for number in (4, 5):
        for env in (batch, single):
            env.reset(0, EpisodeRequest(number))
        for chunk in actions:
            ours, theirs = (env.step([0], chunk) for env in (batch, single))
            for name in ("executed", "terminated", "truncated", "success"):
                assert (getattr(ours, name) == getattr(theirs, name)).all(), name
            assert np.allclose(ours.rewards, theirs.rewards, atol=1e-3) and ours.rewards.dtype == np.float32
            (one,), (other,) = batch.observe([0]), single.observe([0])
            assert all(np.allclose(one.state[k], other.state[k], atol=1e-2) for k in other.state)
        assert theirs.truncated[0] and not ours.executed.any()
    batch.close(), single.close()


@needs_maniskill
def test_an_idle_environment_of_the_batch_stays_where_it_was() -> None:
    from training.envs.maniskill import BatchedManiSkill, ManiSkillConfig

    config = options.read(ManiSkillConfig, {"chunk": 1, "control_mode": "pd_ee_delta_pose"})
    batch = BatchedManiSkill(1, config, "physx_cpu")
    batch.reset(0, EpisodeRequest(0))
    state, steps = batch.env.get_state().clone(), int(batch.env.elapsed_steps[0])
    batch.playing = batch.playing.clone().fill_(False)  # as if another environment of the batch was stepped
    result = batch.step([0], np.full((1, 1, 7), 0.04))
    assert not result.executed.any() and (batch.env.get_state() == state).all()
    assert int(batch.env.elapsed_steps[0]) == steps
    batch.close()


@needs_maniskill
@pytest.mark.long
def test_memory_stays_flat_over_resets(env: Any) -> None:
    """ManiSkill keeps what it builds until Python's collector comes by; nothing else may stay."""
    process, used = psutil.Process(), []
    for number in range(250):
        env.reset(0, EpisodeRequest(number))
        env.observe([0])
        used.append(process.memory_info().rss / 2**20)
    late, early = max(used[200:]), max(used[:50])
    assert late < early + 30, f"{early:.0f} MiB in the first 50 resets, {late:.0f} MiB after 200"


@needs_maniskill
def test_the_tool_moves_as_it_is_told(env: Any) -> None:
    env.reset(0, EpisodeRequest(2))
    actions = np.zeros((1, 5, 7))
    (before,) = env.observe([0])
    told = np.array([0.02, 0.0, 0.01, 0.0, 0.0, 0.03, 1.0])
    env.step([0], actions + told)
    (after,) = env.observe([0])
    moved = after.state["eef_position"] - before.state["eef_position"]
    assert moved[0] > 0.03 and moved[2] > 0.01 and abs(moved[1]) < 0.02
    first, last = (Rotation.from_quat(seen.state["eef_rotation"]) for seen in (before, after))
    assert (last * first.inv()).as_rotvec()[2] > 0.05
    assert after.state["gripper_width"] > 0.07
    env.step([0], actions)
    assert env.observe([0])[0].state["gripper_width"] < 0.06


@needs_maniskill
def test_an_episode_that_is_over_is_not_stepped() -> None:
    short = envs.make("maniskill", 1, chunk=5, max_episode_steps=3)
    with pytest.raises(ValueError, match="plays no episode"):
        short.step([0], np.zeros((1, 5, 8)))
    short.reset(0, EpisodeRequest(0))
    native = short.slots[0].env
    result = short.step([0], np.zeros((1, 5, 8)))
    assert result.executed.tolist() == [[True, True, True, False, False]]
    assert (result.truncated[0], result.terminated[0], result.success[0]) == (True, False, False)
    assert int(native.elapsed_steps[0]) == 3 and not result.rewards[0, 3:].any()
    again = short.step([0], np.zeros((1, 5, 8)))
    assert not again.executed.any() and again.truncated[0] and int(native.elapsed_steps[0]) == 3
    short.close()


@needs_maniskill
@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_a_success_ends_the_episode(reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = envs.make("maniskill", 1, chunk=4, reward=reward)
    env.reset(0, EpisodeRequest(0))
    native = env.slots[0].env
    yes = {"success": native.get_info()["success"] | True}
    found = type(native).evaluate
    monkeypatch.setattr(native, "evaluate", lambda: found(native) | (yes if env.slots[0].steps == 2 else {}))
    result = env.step([0], np.zeros((1, 4, 8)))
    assert result.executed.tolist() == [[True, True, False, False]] and result.success[0]
    assert result.rewards[0, 1] == 1.0
    # Dense rewards would go on, so its value does: as if it had been cut.
    assert (result.terminated[0], result.truncated[0]) == (reward == "sparse", reward == "dense")
    env.close()


@needs_maniskill
def test_what_is_not_there_is_told(env: Any) -> None:
    for settings, message in (
        ({"task": "PickCub-v1"}, "did you mean 'PickCube-v1'"), ({"chunks": 2}, "chunk"),
        ({"task": "LiftPegUpright-v1", "reward": "dence"}, "did you mean 'dense'"),
        ({"task": "TwoRobotPickCube-v1", "max_episode_steps": None, "robot": "pand"}, "did you mean 'panda'"),
    ):  # fmt: skip
        with pytest.raises(SimrealError, match=message):
            envs.make("maniskill", 1, **settings)
    with pytest.raises(SimrealError, match="no variant 'unseen_table'"):
        env.reset(0, EpisodeRequest(0, "unseen_table"))


@needs_maniskill
def test_without_a_gpu_the_other_backend_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SimrealError, match=r"finds no GPU\n.*backend=cpu"):
        envs.make("maniskill", 1, backend="gpu")


@needs_maniskill
def test_without_a_driver_the_version_of_mesa_is_told() -> None:
    """In a process of its own: Vulkan looks for drivers once."""
    program = "from training import envs; envs.make('maniskill', 1, obs='rgb')"
    there = {**os.environ, "VK_ICD_FILENAMES": "/nonexistent.json", "VK_DRIVER_FILES": "/nonexistent.json"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=there)
    assert done.returncode and "GraphicsError: [GRAPHICS]" in done.stderr
    assert "version 24 or later" in done.stderr and "bookworm-backports" in done.stderr


def test_without_maniskill_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("training.envs.maniskill")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [*(name for name in sys.modules if name.split(".")[0] == "mani_skill"), "mani_skill"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SimrealError, match=r"pip install 'simreal\[maniskill\]'") as caught:
        importlib.import_module("training.envs.maniskill")
    assert caught.value.code == "MISSING_MODULE"


@needs_maniskill
def test_an_iteration_of_ppo_on_pick_cube(tmp_path: Path) -> None:
    words = ["experiment=maniskill_pickcube", f"out={tmp_path / 'run'}", "iterations=1", "slots=2", "decisions=8"]
    done = subprocess.run(
        [sys.executable, "-m", "vla", "train", *words, "placement.environment_workers=1", "algorithm.minibatches=2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["rollout/env_steps"] == 16 and row["train/rollout_logprob_gap_max"] < 1e-4
    trained = load(tmp_path / "run/checkpoint", None)
    assert trained.contract == load(tmp_path / "run/start", None).contract and trained.contract.state_size > 30
