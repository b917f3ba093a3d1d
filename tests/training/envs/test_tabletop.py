import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from training import envs
from training.envs import tabletop
from training.envs.base import EpisodeRequest
from training.envs.tabletop import Tabletop, TabletopConfig
from vla.adapters.tabletop import AdapterError
from vla.errors import SimrealError
from vla.tasks.put_on_plate import (
    ALL_VARIANTS,
    MAX_STEPS,
    TRAIN_TABLES,
    Disturbance,
    Episode,
    sample_episode,
)

mujoco = tabletop.mujoco
Play = Callable[..., Any]
HOLD = np.array([0.0, 0, 0, 0, 0, 0, 1.0])  # the action that does nothing, gripper open
SUCCESS = 1.2  # sum of rewards


def chunk(actions: np.ndarray, length: int) -> np.ndarray:
    """Actions `[T, 7]` as chunks `[n, length, 7]`, padded by an upward motion that must never be executed."""
    padding = np.tile([0, 0, 0.02, 0, 0, 0, 1.0], (-len(actions) % length, 1))
    return np.concatenate([actions, padding]).reshape(-1, length, 7)


def parts(episode: Episode) -> tuple[int, ...]:
    return tuple(len(p.item.parts) for p in episode.objects)


def images(env: Tabletop, episode: Episode) -> dict[str, np.ndarray]:
    """First images of an episode, as integers that may be subtracted."""
    env.lay_out(0, episode)
    return {name: image.astype(int) for name, image in env.observe([0])[0].images.items()}


# ---- the same seed, the same episode


@pytest.fixture(scope="module")
def reference(play_expert: Play) -> Iterator[tuple[EpisodeRequest, bytes]]:
    """An episode in a simulator that has played nothing else: one object has one part, the other has two."""
    seed = next(s for s in count(70) if parts(sample_episode(s)) == (1, 2))
    fresh = Tabletop(1)
    yield EpisodeRequest(seed), play_expert(fresh, 0, EpisodeRequest(seed), every=5).fingerprint()
    fresh.close()


def test_an_episode_repeats_bit_for_bit(
    env: Tabletop, play_expert: Play, reference: tuple[EpisodeRequest, bytes]
) -> None:
    request, expected = reference
    for index in (0, 0, 1):
        assert play_expert(env, index, request, every=5).fingerprint() == expected
    other = play_expert(env, 0, EpisodeRequest(request.seed + 1), every=5)
    assert other.fingerprint() != expected


def test_what_a_slot_played_before_leaves_no_trace(
    env: Tabletop, play_expert: Play, reference: tuple[EpisodeRequest, bytes]
) -> None:
    request, expected = reference
    for number, variant in enumerate(ALL_VARIANTS):
        seed = next(s for s in count(200 * number) if parts(sample_episode(s, variant))[:2] == (2, 1))
        env.reset(1, EpisodeRequest(seed, variant))
        env.observe([1])
        env.step([1], np.tile(HOLD - [0, 0, 0.02, 0, 0, 0, 1], (1, 12, 1)))
        if variant in ("unseen_table", "several_objects_unseen", "unseen_start_pose", "wrong_instruction"):
            assert play_expert(env, 1, request, every=5).fingerprint() == expected, variant


@pytest.mark.parametrize("variant", ["dynamic_noise_strong", "dynamic_texture_weak", "object_moved"])
def test_disturbed_episodes_repeat_too(env: Tabletop, play_expert: Play, variant: str) -> None:
    once, again = (play_expert(env, i, EpisodeRequest(5, variant), every=10) for i in (0, 1))
    assert once.fingerprint() == again.fingerprint()


def test_environments_do_not_disturb_each_other(env: Tabletop, play_expert: Play) -> None:
    alone = play_expert(env, 0, EpisodeRequest(31))
    env.reset(0, EpisodeRequest(31))
    env.reset(1, EpisodeRequest(32, "several_objects_seen"))
    rewards = []
    for action in alone.actions:
        result = env.step([1, 0], np.stack([HOLD, action])[:, None])
        env.observe([1])
        rewards.append(result.rewards[1, 0])
    assert rewards == alone.rewards.tolist() and result.success.tolist() == [False, True]


# ---- variants


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_the_expert_solves_every_variant(env: Tabletop, play_expert: Play, variant: str) -> None:
    for seed in (1, 2, 3):
        record = play_expert(env, 0, EpisodeRequest(seed, variant))
        assert record.success and not record.truncated, seed
        assert record.rewards.sum() == pytest.approx(SUCCESS)
        assert len(record.actions) < MAX_STEPS
    seen = env.observe([0])[0]
    assert seen.instruction == sample_episode(3, variant).instruction


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_the_scene_is_what_the_episode_says(env: Tabletop, variant: str) -> None:
    episode = sample_episode(21, variant)
    env.lay_out(0, episode)
    model, data = env.slots[0].model, env.slots[0].data
    bodies = {f"object{i}": p for i, p in enumerate(episode.objects)}
    bodies |= {f"receptacle{i}": p for i, p in enumerate(episode.receptacles)}
    for name, place in bodies.items():
        item, first = place.item, int(model.body(name).geomadr[0])
        assert data.body(name).xpos == pytest.approx([place.x, place.y, item.half_height])
        turned = Rotation.from_euler("z", place.yaw).as_matrix()
        assert data.body(name).xmat.reshape(3, 3) == pytest.approx(turned, abs=1e-9)
        assert model.body(name).mass[0] == pytest.approx(item.mass)
        assert model.geom(first).rgba == pytest.approx([*item.color, 1.0])
        for row, part in enumerate(item.parts, first):
            assert model.geom(row).size[: len(part.size)] == pytest.approx(part.size)
            assert model.geom(row).contype[0] == 1 and model.geom(row).rgba[3] == 1.0
            offset = data.body(name).xpos + turned @ np.array(part.offset)
            assert data.geom(row).xpos == pytest.approx(offset, abs=1e-6)
        for row in range(first + len(item.parts), first + tabletop.mjcf.MAX_PARTS):
            assert model.geom(row).contype[0] == model.geom(row).conaffinity[0] == 0
            assert model.geom(row).rgba[3] == 0.0
    assert model.geom("table").matid[0] == model.material(f"table{episode.table}").id
    assert data.site("tool").xpos == pytest.approx(episode.start_position, abs=2e-3)
    down = Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
    wanted = Rotation.from_rotvec(episode.start_rotation) * down
    reached = Rotation.from_matrix(data.site("tool").xmat.reshape(3, 3))
    assert (wanted.inv() * reached).magnitude() < 0.01


def test_dynamics_and_light_differ_between_episodes(env: Tabletop) -> None:
    drawn = []
    for seed in range(40):
        env.reset(0, EpisodeRequest(seed))
        slot = env.slots[0]
        gains = slot.model.actuator_gainprm[:7, 0] / slot.model.actuator_biasprm[:7, 1]
        assert gains == pytest.approx(-1.0), "position servos: stiffness and gain are the same"
        light = float(slot.model.vis.headlight.ambient[0])
        drawn.append((slot.late.pieces, float(slot.model.actuator_gainprm[0, 0]), light))
    delays, stiffness, light = zip(*drawn, strict=True)
    assert set(delays) == {0, 1, 2, 3}
    assert len(set(stiffness)) == len(set(light)) == 40
    assert 1.1 < max(stiffness) / min(stiffness) <= 1.5 and 1.1 < max(light) / min(light) <= 1.36


def test_the_cameras_see_the_robot(env: Tabletop) -> None:
    env.reset(0, EpisodeRequest(2))
    model, data = env.slots[0].model, env.slots[0].data
    env.observe([0])
    assert env._renderer is not None
    links = ("fr3", "hand", "left", "right")
    robot = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name.startswith(links)]
    for camera, least in (("third_person", 0.02), ("wrist", 0.01)):
        shown = np.sum([env._renderer.mask(model, data, camera, g) for g in robot], axis=0)
        assert shown.mean() > least, camera
    colliding = [model.geom(g).name for g in robot if model.geom_contype[g]]
    assert sorted(colliding) == ["left_finger_pad", "right_finger_pad"]


def target(env: Tabletop, index: int) -> np.ndarray:
    return env.expert_view(index).target


def test_object_moved_moves_it_once(env: Tabletop) -> None:
    episode = sample_episode(4, "object_moved")
    start, happening = episode.objects[0], episode.disturbance
    env.lay_out(0, episode)
    assert happening.move_at_step == 5 and happening.move_to is not None
    env.step([0], np.tile(HOLD, (1, 5, 1)))
    assert target(env, 0)[:2] == pytest.approx([start.x, start.y], abs=0.004)
    env.step([0], np.tile(HOLD, (1, 1, 1)))
    assert target(env, 0)[:2] == pytest.approx(happening.move_to, abs=0.004)
    env.step([0], np.tile(HOLD, (1, 20, 1)))
    assert target(env, 0)[:2] == pytest.approx(happening.move_to, abs=0.004)
    assert target(env, 0)[2] == pytest.approx(start.item.half_height, abs=0.003)


def test_a_grasped_object_is_not_moved(env: Tabletop, play_expert: Play) -> None:
    episode = sample_episode(4)
    still = play_expert(env, 0, episode, every=5)
    grasped = int(np.flatnonzero(still.rewards)[0])
    moving = Disturbance(move_at_step=grasped + 2, move_to=(0.4, -0.11))
    again = play_expert(env, 0, replace(episode, disturbance=moving), every=5)
    assert again.success and again.fingerprint() == still.fingerprint()


@pytest.mark.parametrize("mix", [0.3, 0.5])
def test_noise_covers_the_whole_image(env: Tabletop, mix: float) -> None:
    variant = "dynamic_noise_weak" if mix == 0.3 else "dynamic_noise_strong"
    episode = sample_episode(9, variant)
    clean = images(env, replace(episode, disturbance=Disturbance()))
    noisy = images(env, episode)
    later = env.observe([0])[0].images
    for camera, image in noisy.items():
        change = np.abs(image - clean[camera])
        assert (change.max(-1) > 0).mean() > 0.98 and change.max() <= mix * 255 + 1
        assert change.mean() > 40 * mix
        assert (later[camera] != image).any(-1).mean() > 0.98, "every frame has its own noise"
    assert not np.array_equal(noisy["wrist"] - clean["wrist"], noisy["third_person"] - clean["third_person"])


@pytest.mark.parametrize("mix", [0.3, 0.5])
def test_texture_covers_the_table_only(env: Tabletop, mix: float) -> None:
    variant = "dynamic_texture_weak" if mix == 0.3 else "dynamic_texture_strong"
    episode = sample_episode(9, variant)
    plain = replace(episode, disturbance=Disturbance())
    clean = images(env, plain)
    textured = images(env, episode)
    later = env.observe([0])[0].images
    # Pixels that show the table are those that another table changes; the lights cast no shadow.
    looks = [images(env, replace(plain, table=look)) for look in TRAIN_TABLES]
    for camera, image in textured.items():
        table = np.any([(look[camera] != clean[camera]).any(-1) for look in looks], axis=0)
        changed = (image != clean[camera]).any(-1)
        assert 0.2 < table.mean() < 0.98
        assert not (changed & ~table).any()
        assert changed.sum() > 0.98 * table.sum()
        assert np.abs(image - clean[camera]).max() <= mix * 255 + 1
        assert ((later[camera] != image).any(-1) & table).sum() > 0.95 * table.sum()


def test_disturbed_images_leave_the_physics_alone(env: Tabletop, play_expert: Play) -> None:
    episode = sample_episode(9, "dynamic_noise_strong")
    disturbed = play_expert(env, 0, episode, every=10)
    clean = play_expert(env, 0, replace(episode, disturbance=Disturbance()), every=10)
    assert disturbed.actions.tobytes() == clean.actions.tobytes()
    for a, b in zip(disturbed.seen, clean.seen, strict=True):
        assert all(a.state[k].tobytes() == b.state[k].tobytes() for k in a.state)


def test_other_variants_look_as_they_are_laid_out(env: Tabletop) -> None:
    episode = sample_episode(9)
    clean = images(env, episode)
    others = {
        "table": replace(episode, table=20),
        "object": replace(episode, objects=(replace(episode.objects[0], yaw=0.5), episode.objects[1])),
        "receptacle": replace(episode, receptacles=sample_episode(9, "unseen_receptacle").receptacles),
    }
    for name, other in others.items():
        changed = {c: (i != clean[c]).any(-1).mean() for c, i in images(env, other).items()}
        assert changed["third_person"] > (0.3 if name == "table" else 0.0), name


# ---- stepping


def test_chunks_give_what_single_steps_give_and_stop_at_success(env: Tabletop, play_expert: Play) -> None:
    single = play_expert(env, 0, EpisodeRequest(6), every=4)
    steps = len(single.actions)
    env.reset(1, EpisodeRequest(6))
    length = 7 if steps % 7 else 8
    *rest, last = [env.step([1], c[None]) for c in chunk(single.actions, length)]
    for result in rest:
        assert result.executed.all() and not (result.terminated | result.truncated | result.success).any()
    assert last.executed.tolist() == [[True] * (steps % length) + [False] * (-steps % length)]
    assert last.terminated.tolist() == last.success.tolist() == [True] and last.truncated.tolist() == [False]
    rewards = np.concatenate([r.rewards[0] for r in (*rest, last)])
    assert rewards[:steps].tobytes() == single.rewards.tobytes() and not rewards[steps:].any()
    assert rewards.sum() == pytest.approx(SUCCESS)
    end, same = env.observe([1])[0], single.seen[-1]
    assert all(end.state[k].tobytes() == same.state[k].tobytes() for k in end.state)


def test_dense_reward_ends_where_the_sparse_one_does_plus_one(play_expert: Play) -> None:
    """Both terms of the progress reach their 0.5 with success, whatever lay between."""
    dense = Tabletop(1, TabletopConfig(reward="dense"))
    request = EpisodeRequest(77)
    dense.reset(0, request)
    episode = sample_episode(77)
    tool = np.asarray(episode.start_position)
    distance = np.linalg.norm(tool - [episode.objects[0].x, episode.objects[0].y, episode.objects[0].item.half_height])
    start = 0.5 * (1 - 0.5 * np.tanh(6 * distance) - 0.5 * np.tanh(40 * distance))
    record = play_expert(dense, 0, request)
    dense.close()
    assert record.success and record.rewards.sum() == pytest.approx(SUCCESS + 1.0 - start, abs=2e-3)
    assert (record.rewards != 0).mean() > 0.9  # it speaks at nearly every step


def test_shapes_and_time_limit(env: Tabletop) -> None:
    env.reset(0, EpisodeRequest(1))
    env.reset(1, EpisodeRequest(2))
    chunks = np.tile(HOLD, (2, 7, 1))
    results = [env.step([0, 1], chunks) for _ in range(-(-MAX_STEPS // 7))]
    for result in results:
        assert result.rewards.shape == result.executed.shape == (2, 7)
        assert result.rewards.dtype == np.float32 and result.executed.dtype == bool
        for flag in (result.terminated, result.truncated, result.success):
            assert flag.shape == (2,) and flag.dtype == bool
        assert not result.rewards.any() and not result.terminated.any()
    assert not any(r.truncated.any() for r in results[:-1])
    assert results[-1].truncated.all() and not results[-1].success.any()
    assert sum(r.executed.sum(1) for r in results).tolist() == [MAX_STEPS] * 2


@pytest.mark.parametrize("success", [True, False])
def test_an_episode_that_is_over_is_not_stepped(env: Tabletop, play_expert: Play, success: bool) -> None:
    if success:
        play_expert(env, 0, EpisodeRequest(6))
    else:
        env.reset(0, EpisodeRequest(6))
        env.step([0], np.tile(HOLD, (1, MAX_STEPS, 1)))
    before, view = env.observe([0])[0], env.expert_view(0)
    result = env.step([0], np.tile([0.02, 0, 0.02, 0, 0, 0, 0], (1, 8, 1)))
    assert not result.executed.any() and not result.rewards.any()
    assert [result.terminated[0], result.truncated[0], result.success[0]] == [success, not success, success]
    after = env.observe([0])[0]
    assert after.stamps == before.stamps
    assert all(after.images[k].tobytes() == before.images[k].tobytes() for k in before.images)
    for field in dataclasses.fields(view):
        assert np.array_equal(getattr(view, field.name), getattr(env.expert_view(0), field.name))


def test_only_observe_renders(env: Tabletop, play_expert: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    render = mujoco.mjr_render

    def counted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        render(*arguments)

    monkeypatch.setattr(mujoco, "mjr_render", counted)
    for variant in ("in_distribution", "dynamic_noise_strong", "dynamic_texture_strong"):
        play_expert(env, 0, EpisodeRequest(3, variant))
        env.privileged([0, 1])
    assert calls == 0
    for number in (1, 2):
        env.reset(0, EpisodeRequest(3))
        env.observe([0])
        assert calls == 2 * number, "one frame of each camera"


def test_a_bad_action_is_refused_and_nothing_moves(env: Tabletop) -> None:
    for index in (0, 1):
        env.reset(index, EpisodeRequest(8))
    before = env.observe([0, 1])
    for value in (np.nan, np.inf):
        actions = np.tile(HOLD, (2, 4, 1))
        actions[1, 3, 2] = value
        with pytest.raises(AdapterError, match=r"ACTION_ROW.*finite"):
            env.step([0, 1], actions)
    with pytest.raises(AdapterError, match="ACTION_ROW"):
        env.step([0], np.zeros((1, 4, 6)))
    with pytest.raises(ValueError, match="one row for each"):
        env.step([0], np.tile(HOLD, (2, 4, 1)))
    for a, b in zip(before, env.observe([0, 1]), strict=True):
        assert a.stamps == b.stamps and all(a.state[k].tobytes() == b.state[k].tobytes() for k in a.state)


def test_stepping_before_a_reset_is_refused() -> None:
    with pytest.raises(ValueError, match="reset it"):
        Tabletop(1).step([0], np.tile(HOLD, (1, 1, 1)))


def test_an_action_beyond_its_bound_is_cut(env: Tabletop) -> None:
    for index, distance in ((0, 5.0), (1, env.config.max_translation)):
        env.reset(index, EpisodeRequest(8))
        env.step([index], np.tile([distance, 0, 0, 0, 0, 0, 1.0], (1, 3, 1)))
    cut, allowed = (env.observe([index])[0].state["eef_position"] for index in (0, 1))
    assert cut.tolist() == allowed.tolist()


# ---- observations


def test_observations_are_the_state_of_the_simulator(env: Tabletop, play_expert: Play) -> None:
    play_expert(env, 0, EpisodeRequest(12))
    slot, seen = env.slots[0], env.observe([0])[0]
    data, site = slot.data, slot.data.site("tool")
    assert np.array_equal(data.body("base").xpos, np.zeros(3)), "the world's frame is the robot's base frame"
    assert seen.state["eef_position"].tobytes() == site.xpos.tobytes()
    matrix = Rotation.from_quat(seen.state["eef_rotation"]).as_matrix()
    assert matrix == pytest.approx(site.xmat.reshape(3, 3), abs=1e-9)
    fingers = data.joint("finger_joint1").qpos + data.joint("finger_joint2").qpos
    assert seen.state["gripper_width"].tobytes() == fingers.tobytes()
    assert seen.state["commanded_position"].tobytes() == slot.command_position.tobytes()
    assert set(seen.stamps.values()) == {float(data.time)}
    fresh = mujoco.MjData(slot.model)
    fresh.qpos[:] = data.qpos
    mujoco.mj_kinematics(slot.model, fresh)
    lag = 2e-3  # m: MuJoCo leaves positions one physics step behind the joints
    assert seen.state["eef_position"] == pytest.approx(fresh.site("tool").xpos, abs=lag)
    for camera in env.contract.cameras:
        image = seen.images[camera.name]
        assert image.shape == (camera.height, camera.width, 3) and image.dtype == np.uint8
        assert slot.model.camera(camera.name).fovy[0] == camera.fov_y_deg
    for field in env.contract.state:
        assert seen.state[field.name].shape == field.shape and seen.state[field.name].dtype == np.float64


def test_the_clock_runs_at_the_rate_of_the_contract(env: Tabletop) -> None:
    env.reset(0, EpisodeRequest(12))
    start = env.observe([0])[0].stamps["wrist"]
    env.step([0], np.tile(HOLD, (1, 20, 1)))
    elapsed = env.observe([0])[0].stamps["wrist"] - start
    assert elapsed == pytest.approx(20 / env.contract.action.rate_hz)


def test_privileged_points_at_what_the_cameras_see(env: Tabletop) -> None:
    misses = []
    for seed in range(8):
        env.reset(0, EpisodeRequest(seed))
        env.observe([0])
        truth, slot = env.privileged([0])[0], env.slots[0]
        assert truth.shape == (env.privileged_size,) and truth.dtype == np.float32
        episode = sample_episode(seed)
        start, goal = episode.objects[0], episode.receptacles[0]
        positions = truth[:9].reshape(3, 3) / 10 + slot.command_position
        assert positions[0] == pytest.approx([start.x, start.y, start.item.half_height], abs=1e-4)
        assert positions[1] == pytest.approx([goal.x, goal.y, goal.item.half_height], abs=1e-4)
        assert positions[2] == pytest.approx(episode.start_position, abs=2e-3)
        for camera, pointed in (("third_person", truth[9:11]), ("wrist", truth[13:15])):
            body = slot.model.body("object0")
            assert env._renderer is not None
            mask = env._renderer.mask(slot.model, slot.data, camera, int(body.geomadr[0]))
            if mask.sum() > 4 and np.isfinite(pointed).all():
                y, x = (2 * (np.mean(index) + 0.5) / 64 - 1 for index in np.nonzero(mask))
                misses.append(float(np.hypot(x - pointed[0], y - pointed[1])))
    assert len(misses) >= 8 and np.median(misses) < 0.08 and max(misses) < 0.3


def test_a_critic_is_told_the_state_after_every_action(env: Tabletop, play_expert: Play) -> None:
    seen = []
    for seed in range(4):
        env.reset(0, EpisodeRequest(seed))
        slot = env.slots[0]
        at_rest = env.critic_state([0])[0]
        offset = slot.data.body("object0").xpos - slot.data.site("tool").xpos
        assert at_rest.shape == (env.critic_size,) and at_rest.dtype == np.float32
        assert at_rest[:3] / 10 == pytest.approx(offset, abs=1e-6) and at_rest[-1] == 1.0
        actions = np.tile([0, 0, -0.01, 0, 0, 0, 1.0], (1, 5, 1))
        result = env.step([0], actions)
        assert result.critic_states.shape == (1, 5, env.critic_size)
        assert np.array_equal(result.critic_states[0, -1], env.critic_state([0])[0])
        heights = result.critic_states[0, :, 2]  # of the object above the tool, which sinks
        assert (np.diff(heights) > 0).all() and heights[0] > at_rest[2]
        seen.append(result.critic_states[0])
    assert np.isfinite(seen).all() and np.abs(seen).max() < 10
    play_expert(env, 0, EpisodeRequest(3))
    flags = env.critic_state([0])[0][-7:-4]
    assert flags.tolist() == [0.0, 1.0, 1.0], "let go, was touched and lifted"


# ---- building


def test_registry_builds_it_with_options() -> None:
    small = envs.make("tabletop", 1, image_size=36, chunk=4)
    small.reset(0, EpisodeRequest(1, "dynamic_noise_strong"))
    assert small.observe([0])[0].images["wrist"].shape == (36, 36, 3)
    assert small.contract.action.chunk == 4 and small.num_envs == 1
    small.close()
    small.close()
    with pytest.raises(SimrealError, match=r"unknown environment 'tabletopp': did you mean 'tabletop'") as caught:
        envs.make("tabletopp", 1)
    assert "vla envs" in caught.value.remedy


@pytest.mark.parametrize("backend", ["broken", "disable"])
def test_without_a_gl_backend_the_remedy_is_named(backend: str) -> None:
    code = (
        "from training.envs.base import EpisodeRequest, GraphicsError\n"
        "try:\n"
        "    from training.envs.tabletop import Tabletop\n"
        "    env = Tabletop(1)\n"
        "    env.reset(0, EpisodeRequest(1))\n"
        "    env.observe([0])\n"
        "except GraphicsError as error:\n"
        "    print(error.code, error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GRAPHICS [GRAPHICS] MuJoCo cannot")
    assert f"MUJOCO_GL={backend}" in done.stdout
    assert "Install libegl1" in done.stdout and "vla doctor" in done.stdout


def test_a_command_prints_the_remedy_without_a_traceback(tmp_path: Any) -> None:
    code = f"from vla.cli import main; raise SystemExit(main(['demos', 'out={tmp_path}/demos']))"
    environment = {**os.environ, "MUJOCO_GL": "broken"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "[GRAPHICS]" in done.stderr and "vla doctor" in done.stderr


def test_settings_that_an_environment_does_not_take_are_named() -> None:
    with pytest.raises(SimrealError, match="unexpected keyword argument 'reward'") as caught:
        envs.make("training.envs.tabletop:Tabletop", 1, reward="dense")
    assert "env=null" in caught.value.remedy
