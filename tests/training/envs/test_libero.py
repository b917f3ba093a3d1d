"""LIBERO behind the interface of all simulators. Without the package these are skipped, but not in CI."""

import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from training import envs
from training.demos import expert_of
from training.envs.base import EpisodeRequest
from training.envs.libero_process import Process
from vla.errors import SimrealError

ROOT = Path(__file__).parents[3]
VARIABLE = "SIMREAL_LIBERO_ASSETS"
PLACES = [Path(os.environ[VARIABLE])] if VARIABLE in os.environ else [p / "shared/assets/libero" for p in ROOT.parents]
ASSETS = next((str(place) for place in PLACES if place.is_dir()), None)
absent = importlib.util.find_spec("robosuite") is None and os.environ.get("CI") != "true"
needs_libero = pytest.mark.skipif(absent, reason="LIBERO is not installed, see docs/simulators/libero.md")
reason = f"no assets of LIBERO; {VARIABLE} names their folder"
needs_assets = pytest.mark.skipif(absent or ASSETS is None, reason=reason)
STAY = np.array([0, 0, 0, 0, 0, 0, 1.0])


def make(num_envs: int = 1, **settings: Any) -> Any:
    return envs.make("libero", num_envs, **({"image_size": 64, "assets": ASSETS} | settings))


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    made = make(2)
    yield made
    made.close()


def ask(env: Any, name: str, *given: Any, index: int = 0) -> Any:
    """The answer of the process of an environment."""
    env.slots[index].send(name, *given)
    return env.slots[index].collect()


def chunk(seed: int, length: int = 4) -> np.ndarray:
    """Random actions `[1, length, 7]` within the bounds."""
    high = np.array([0.05] * 3 + [0.3] * 3)
    random = np.random.default_rng(seed)
    return np.concatenate([random.uniform(-high, high, (1, length, 6)), random.integers(0, 2, (1, length, 1))], 2)


def play(env: Any, index: int, request: EpisodeRequest, chunks: int = 2) -> bytes:
    """Every bit of what is seen and of the simulation's state, through an episode's beginning."""
    env.reset(index, request)
    heard = []
    for number in range(chunks):
        (seen,) = env.observe([index])
        result = env.step([index], chunk(number))
        heard += [*seen.images.values(), *seen.state.values(), result.rewards, result.critic_states]
        heard.append(ask(env, "state", index=index))
    return b"".join(np.asarray(part).tobytes() for part in heard)


@needs_assets
def test_the_same_request_is_the_same_episode_whatever_was_played_before(env: Any) -> None:
    request = EpisodeRequest(3, "libero_spatial/0")
    first = play(env, 0, request)
    assert play(env, 0, EpisodeRequest(4, "libero_spatial/0")) != first
    assert play(env, 0, request) == first
    play(env, 0, EpisodeRequest(1, "libero_goal/7"))  # another scene, in which a stove's light changes
    assert play(env, 0, request) == first
    assert play(env, 1, request) == first


@needs_assets
def test_only_what_somebody_looks_at_is_rendered(env: Any) -> None:
    env.reset(0, EpisodeRequest(1, "libero_spatial/0"))
    before = ask(env, "drawn")
    env.step([0], chunk(0, 8))
    assert ask(env, "drawn") == before
    env.observe([0])
    assert ask(env, "drawn") == before + 2
    picture = env.picture(0, 96)
    assert ask(env, "drawn") == before + 3 and picture.shape == (96, 96, 3) and picture.std() > 10


@needs_assets
def test_images_without_smooth_edges_differ_there_only() -> None:
    seen = []
    for antialiasing in (True, False):
        env = make(antialiasing=antialiasing)
        env.reset(0, EpisodeRequest(1, "libero_spatial/0"))
        seen.append(env.observe([0])[0].images["third_person"].astype(float))
        env.close()
    apart = np.abs(seen[0] - seen[1]).max(-1)
    assert 0.05 < (apart > 10).mean() < 0.5 and np.median(apart) < 3


@needs_assets
def test_coarse_meshes_look_the_same_and_physics_does_not_know() -> None:
    seen, states = [], []
    for mesh_edge in (None, 0.005):
        env = make(image_size=64, mesh_edge=mesh_edge)
        env.reset(0, EpisodeRequest(1, "libero_object/0"))
        env.step([0], chunk(1))
        seen.append(np.stack(list(env.observe([0])[0].images.values())).astype(float))
        states.append(ask(env, "state"))
        env.close()
    np.testing.assert_array_equal(*states)
    assert 0 < np.abs(seen[0] - seen[1]).mean() < 2


@needs_libero
def test_a_coarse_mesh_has_few_triangles_and_its_shape() -> None:
    import mujoco

    from training.envs.libero_meshes import coarsen

    def corners(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centres of triangles, and normals as long as twice their areas."""
        a, b, c = np.moveaxis(points[faces], 1, 0)
        return (a + b + c) / 3, np.cross(b - a, c - a)

    turn, height = np.arange(10_000) * np.pi * (3 - np.sqrt(5)), np.linspace(-1, 1, 10_000)
    ball = 0.05 * np.stack([*(np.sqrt(1 - height**2) * (np.cos(turn), np.sin(turn))), height], 1)
    fine = ConvexHull(ball).simplices
    inwards = np.einsum("ij,ij->i", *corners(ball, fine)) < 0
    fine[inwards] = fine[inwards, ::-1]
    spec = mujoco.MjSpec()
    spec.add_mesh(name="ball", uservert=ball.ravel(), userface=fine.ravel())
    for touched in (0, 1):
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="ball", contype=touched, conaffinity=touched)
    assert coarsen(spec.compile(), 0.01) == 0  # both share it
    spec.delete(spec.geoms[1])
    model = spec.compile()
    assert coarsen(model, 0.01) == len(fine) - model.mesh_facenum[0] and model.mesh_facenum[0] < len(fine) / 10
    coarse = model.mesh_face[: model.mesh_facenum[0]]
    centres, normals = corners(model.mesh_vert, coarse)
    assert abs(np.linalg.norm(centres, axis=1) - 0.05).max() < 0.004
    assert np.linalg.norm(normals, axis=1).sum() == pytest.approx(2 * 4 * np.pi * 0.05**2, rel=0.05)
    told = model.mesh_normal[model.mesh_facenormal[: len(coarse)]].mean(1)
    assert (np.einsum("ij,ij->i", told, centres) > 0).all()  # those of the corners that are left
    assert coarsen(model, 1.0) == 0  # nothing would be left of it


@needs_assets
def test_a_way_to_render_is_found_where_none_is_named() -> None:
    """These tests name one for all of their processes; whoever imports LIBERO's MuJoCo too early has none."""
    words = [
        "from training.envs.libero_scene import Worker",
        f"worker = Worker({ASSETS!r}, 64, 1, True, None)",
        "from training.envs import libero_files as files",
        "worker.reset(str(files.tasks('libero_object')[0].bddl), None, 1, None)",
        "assert worker.picture('frontview', 64).std() > 10",
    ]
    unnamed = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    subprocess.run([sys.executable, "-c", "\n".join(words)], cwd=ROOT, env=unnamed, check=True)


@needs_assets
def test_the_tool_moves_as_it_is_told(env: Any) -> None:
    env.reset(0, EpisodeRequest(1, "libero_spatial/0"))
    (before,) = env.observe([0])
    env.step([0], np.tile([0.02, 0.0, 0.03, 0.0, 0.0, 0.2, 1.0], (1, 8, 1)))
    (after,) = env.observe([0])
    moved = after.state["eef_position"] - before.state["eef_position"]
    assert moved[0] > 0.02 and moved[2] > 0.03 and abs(moved[1]) < 0.01
    first, last = (Rotation.from_quat(seen.state["eef_rotation"]) for seen in (before, after))
    turned = (last * first.inv()).as_rotvec()
    assert turned[2] > 0.2 and abs(turned[:2]).max() < 0.1
    assert after.state["gripper_width"] > 0.07
    assert after.stamps["wrist"] - before.stamps["wrist"] == pytest.approx(8 / 20)
    env.step([0], np.tile([0.0] * 7, (1, 12, 1)))
    assert env.observe([0])[0].state["gripper_width"] < 0.02


@needs_assets
def test_the_time_limit_is_that_of_the_suite_and_an_episode_that_is_over_is_left_alone() -> None:
    env = make(max_steps=3)
    with pytest.raises(ValueError, match="plays no episode"):
        env.step([0], STAY[None, None])
    env.reset(0, EpisodeRequest(1, "libero_object/2"))
    result = env.step([0], np.tile(STAY, (1, 8, 1)))
    assert result.executed.tolist() == [[True] * 3 + [False] * 5] and result.rewards.dtype == np.float32
    assert (result.truncated[0], result.terminated[0], result.success[0]) == (True, False, False)
    state = ask(env, "state")
    again = env.step([0], chunk(0))
    assert not again.executed.any() and again.truncated[0] and np.array_equal(ask(env, "state"), state)
    env.close()


@needs_assets
def test_a_refused_batch_changes_nothing(env: Any) -> None:
    for index in (0, 1):
        env.reset(index, EpisodeRequest(1, "libero_spatial/0"))
    before = ask(env, "state")
    broken = np.concatenate([chunk(0), chunk(1)])
    broken[1, 3, 2] = np.nan
    for actions in (broken, np.zeros((2, 4, 6)), np.zeros((1, 4, 7))):
        with pytest.raises(ValueError):
            env.step([0, 1], actions)
    assert np.array_equal(ask(env, "state"), before)


@needs_assets
def test_the_expert_succeeds_and_the_reward_says_so_once() -> None:
    env = make(suite="libero_object")
    env.reset(0, EpisodeRequest(1, "libero_object/6"))
    expert, rewards = expert_of(env), 0.0
    for _ in range(env.max_steps):
        result = env.step([0], expert.act(env.expert_view(0))[None, None])
        rewards += float(result.rewards.sum())
        if result.terminated[0]:
            break
    assert result.success[0] and not result.truncated[0] and rewards == 1.0 and ask(env, "drawn") == 0
    again = env.step([0], chunk(0))
    assert again.success[0] and again.terminated[0] and not again.rewards.any() and not again.executed.any()
    env.reset(0, EpisodeRequest(1, "libero_goal/0"))
    with pytest.raises(SimrealError, match=r"no scripted expert\n.*libero_spatial"):
        env.expert_view(0)
    env.close()


@needs_assets
def test_a_dense_reward_tells_progress_and_the_critic_what_there_is_to_know() -> None:
    sparse, dense = make(suite="libero_object"), make(suite="libero_object", reward="dense")
    request = EpisodeRequest(1, "libero_object/6")
    for env in (sparse, dense):
        env.reset(0, request)
    expert, rewards, told, alike = expert_of(dense), [], [dense.critic_state([0])[0]], True
    for _ in range(dense.max_steps):
        action = expert.act(dense.expert_view(0))[None, None]
        result, other = dense.step([0], action), sparse.step([0], action)
        rewards.append(float(result.rewards[0, 0]))
        told.append(result.critic_states[0, 0])
        alike &= np.array_equal(result.critic_states, other.critic_states)
        assert other.rewards[0, 0] == float(other.success[0]) and result.success[0] == other.success[0]
        if result.terminated[0]:
            break
    states = np.array(told)
    assert alike and states.shape == (len(rewards) + 1, dense.critic_size) and np.isfinite(states).all()
    assert np.array_equal(dense.critic_state([0])[0], states[-1])
    # 1 for success, 0.1 each for the grasp and the lift, and all of the progress that was not there at first.
    assert 1.9 < sum(rewards) < 2.2 and rewards[-1] > 1.0
    assert np.abs(rewards[:-1]).max() < 0.7 and np.mean(np.array(rewards) > 0) > 0.6
    held, was_held, was_lifted = states[:, 13:16].T
    assert not states[0, 13:16].any() and held.any() and was_held[-1] and was_lifted[-1]
    assert (np.diff(was_held) >= 0).all() and np.argmax(was_lifted) >= np.argmax(was_held) + 2
    np.testing.assert_allclose(states[:, -1], 1 - np.arange(len(states)) / 280, rtol=1e-5)
    nearest = np.linalg.norm(states[:, :3], axis=1) * 0.1
    assert nearest[np.argmax(was_held)] < 0.03 < 0.1 < nearest[0]
    for env in (sparse, dense):
        env.reset(0, EpisodeRequest(1, "libero_goal/7"))  # no expert: the critic is told nothing of it
        assert not env.critic_state([0]).any() and not env.step([0], chunk(0)).critic_states.any()
        env.close()


def test_a_thing_whose_top_is_a_point_is_grasped_there() -> None:
    grasp = importlib.import_module("training.envs.libero_grasp")
    angle, place = grasp._rim(np.array([[0.1, 0.2, 0.3], [0.4, 0.2, 0.1]]), np.zeros((0, 3)), 0.29)
    assert angle == 0.0 and place.tolist() == [0.1, 0.2]


@needs_assets
def test_the_privileged_state_says_where_things_are_in_the_images(env: Any) -> None:
    """The place of the black bowl is dark in the turned image, though not in its mirror image."""
    env.reset(0, EpisodeRequest(1, "libero_spatial/2"))
    (told,) = env.privileged([0])
    assert env.privileged_size == 17 and told.shape == (17,) and not told[6:9].any()
    view = env.expert_view(0)
    np.testing.assert_allclose(told[:3], (view.target - view.commanded) / 0.1, rtol=1e-5)
    image = env.observe([0])[0].images["third_person"].mean(-1)
    row, column = (np.round((told[[10, 9]] + 1) / 2 * 63)).astype(int)
    around = (slice(row - 2, row + 4), slice(column - 2, column + 3))
    assert image[around].min() < 60 < 90 < image[:, ::-1][around].min()
    env.reset(0, EpisodeRequest(1, "libero_goal/7"))
    assert np.isnan(env.privileged([0])).all()
    assert make(suite="libero_goal").privileged_size == 0


@needs_assets
def test_nobody_sees_a_process_that_crashes_once(caplog: pytest.LogCaptureFixture) -> None:
    env = make(reward="dense")
    request = EpisodeRequest(3, "libero_spatial/0")
    undisturbed = play(env, 0, request, 3)
    env.reset(0, request)
    heard = []
    for number in range(3):
        (seen,) = env.observe([0])
        if number == 2:
            os.kill(env.slots[0].process.pid, signal.SIGSEGV)
        result = env.step([0], chunk(number))
        heard += [*seen.images.values(), *seen.state.values(), result.rewards, result.critic_states]
        heard.append(ask(env, "state"))
    assert b"".join(np.asarray(part).tobytes() for part in heard) == undisturbed
    assert "signal 11" in caplog.text and "libero_spatial/0, seed 3, step 8" in caplog.text
    env.close()


@needs_assets
def test_an_episode_that_crashes_again_counts_as_truncated_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    env = make(2)
    for index in (0, 1):
        env.reset(index, EpisodeRequest(1, "libero_spatial/0"))
    for _ in range(2):
        ask(env, "state")
        os.kill(env.slots[0].process.pid, signal.SIGSEGV)
        result = env.step([0, 1], np.concatenate([chunk(0), chunk(0)]))
    assert result.truncated.tolist() == [True, False] and not result.success.any()
    assert not result.executed[0].any() and result.executed[1].all()
    assert "given up" in caplog.text
    assert env.observe([0])[0].images["wrist"].std() > 5  # of its beginning: a value is asked of it
    env.reset(0, EpisodeRequest(2, "libero_spatial/0"))
    assert env.step([0], chunk(0)).executed.all()
    env.close()


@needs_assets
def test_the_process_ends_with_its_environment() -> None:
    env = make()
    env.reset(0, EpisodeRequest(1, "libero_spatial/0"))
    ask(env, "state")
    child = env.slots[0].process._child
    env.close()
    assert child.poll() is not None


@needs_libero
def test_all_130_tasks_have_fixed_states_and_a_sentence(tmp_path: Path) -> None:
    files = importlib.import_module("training.envs.libero_files")
    env = make(assets=str(stand_in(tmp_path)))
    assert [len(members) for members in env.axes.values()] == [10, 10, 10, 10, 90]
    limits = [env._limit(files.tasks(suite)[0]) for suite in env.axes]
    assert limits == [220, 280, 300, 520, 400]
    sentences = set()
    for suite in env.axes:
        for task in files.tasks(suite):
            assert files.initial_states(task).shape[0] == 50 and task.bddl.exists() and task.goals
            sentences.add(task.instruction)
    assert len(sentences) > 100 and "turn on the stove" in sentences
    assert files.tasks("libero_spatial")[0].goals == [["on", "akita_black_bowl_1", "plate_1"]]


@needs_libero
def test_tasks_and_states_are_those_of_the_request(tmp_path: Path) -> None:
    env = make(suite="libero_goal", tasks=[2, 5], assets=str(stand_in(tmp_path)))
    drawn = {env.task(EpisodeRequest(seed)).variant for seed in range(1_000_000, 1_000_020)}
    assert drawn == {"libero_goal/2", "libero_goal/5"} and env.max_steps == 300
    assert env.instructions == tuple(env.task(EpisodeRequest(1, f"libero_goal/{n}")).instruction for n in (2, 5))
    assert env.task(EpisodeRequest(1, "libero_90/89")).suite == "libero_90"
    assert len({env.task(EpisodeRequest(seed, "libero_10")).index for seed in range(60)}) == 10


@needs_libero
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "libero_spacial"}, "did you mean 'libero_spatial'"),
        ({"tasks": [3, 10]}, r"TASKS.*libero_spatial has tasks 0 to 9"),
        ({"tasks": []}, "TASKS"),
        ({"chunks": 2}, "did you mean 'chunk'"),
        ({"scenes": 0}, "must be 1 or more"),
        ({"mesh_edge": 0.05}, r"mesh_edge=0.05: must be more than 0 and at most 0.02 m"),
        ({"suite": "libero_goal", "reward": "dense"}, r"no expert that knows progress in libero_goal/0(.|\n)*sparse"),
        ({"max_translation": 0.1}, "ACTION_BOUND"),
        ({"assets": "/nowhere"}, r"ASSETS.*nowhere(.|\n)*lerobot/libero-assets(.|\n)*420 MB"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SimrealError, match=message):
        make(**{"assets": str(stand_in(tmp_path)), **settings})


@needs_libero
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("libero_spatial/10", "libero_spatial has tasks 0 to 9"),
        ("libero_spatal/3", "did you mean 'libero_spatial'"),
        ("unseen_table", "valid names: in_distribution, libero_10"),
    ],
)
def test_an_unknown_variant_is_told(variant: str, message: str, tmp_path: Path) -> None:
    env = make(assets=str(stand_in(tmp_path)))
    with pytest.raises(SimrealError, match=message):
        env.reset(0, EpisodeRequest(1, variant))


@needs_libero
def test_without_a_network_the_missing_assets_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    files = importlib.import_module("training.envs.libero_files")
    monkeypatch.setattr(files.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(files, "get_libero_path", lambda key: str(tmp_path / key))
    code = "import training.envs.libero_files as f; f.assets(None)"
    surroundings = {k: v for k, v in os.environ.items() if k != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=surroundings | {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "ASSETS" in done.stderr and "lerobot/libero-assets" in done.stderr and "420 MB" in done.stderr


@needs_libero
def test_the_initial_states_that_are_missing_are_told(tmp_path: Path) -> None:
    files = importlib.import_module("training.envs.libero_files")
    task = files.Task("libero_spatial", 0, "", tmp_path / "a.bddl", tmp_path / "a.pruned_init")
    with pytest.raises(SimrealError, match=r"INITIAL_STATES(.|\n)*initial_states=random"):
        files.initial_states(task)


@needs_libero
def test_libero_asks_nobody_anything_and_a_users_file_is_left_alone(tmp_path: Path) -> None:
    def load(**more: str) -> subprocess.CompletedProcess[str]:
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("LIBERO", "XDG"))}
        code = "import training.envs.libero_files as f; print(f.tasks('libero_goal')[0].bddl)"
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env=surroundings | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), **more},
        )  # fmt: skip

    done = load()
    assert done.returncode == 0 and "?" not in done.stdout and Path(done.stdout.strip()).exists(), done.stderr
    assert (tmp_path / ".cache/simreal/libero/config.yaml").exists() and not (tmp_path / ".libero").exists()
    own = tmp_path / "own/config.yaml"
    own.parent.mkdir()
    own.write_text("bddl_files: /mine\ninit_states: /mine\nassets: /mine\nbenchmark_root: /mine\ndatasets: /mine\n")
    before = own.read_bytes()
    done = load(LIBERO_CONFIG_PATH=str(own.parent))
    assert done.stdout.startswith("/mine/libero_goal/") and own.read_bytes() == before


def test_without_libero_the_commands_that_install_it_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    files = importlib.import_module("training.envs.libero_files")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bddl" else real(name, *more))
    command = r"simreal\[libero\]' && pip install --no-deps 'hf-libero"
    with pytest.raises(SimrealError, match=rf"bddl(.|\n)*{command}") as told:
        files.configure()
    assert told.value.code == "MISSING_MODULE"


@needs_libero
def test_an_error_in_a_process_is_told_with_where_it_happened() -> None:
    process = Process("training.envs.libero_scene", {"nonsense": 1})
    process.send("memory")
    with pytest.raises(RuntimeError, match="nonsense"):
        process.receive()
    process.end()
    assert process.pid is None


@pytest.mark.long
@needs_assets
@pytest.mark.parametrize("variant", ["libero_spatial/0", "libero_goal/7"])
def test_observations_and_states_are_those_of_libero_bit_for_bit(variant: str) -> None:
    """Against LIBERO's own environment, which compiles its scene for each episode and renders after each step."""
    from training.envs import libero_files as files
    from vla.adapters import libero as adapter

    env = make(image_size=128)
    request = EpisodeRequest(3, variant)
    task = env.task(request)
    plain = Process("benchmarks.libero_plain", {"assets": ASSETS, "image_size": 128, "bddl": str(task.bddl)})
    plain.send("reset", files.initial_states(task)[2], 3)
    plain.receive()
    env.reset(0, request)
    actions = chunk(5, 16)
    plain.send("step", np.array([adapter.command(action) for action in actions[0]]))
    plain.receive()
    plain.send("observe")
    theirs = plain.receive()
    env.step([0], actions)
    mine = ask(env, "observe", tuple(adapter.NATIVE_CAMERAS.values())) | {"state": ask(env, "state")}
    for key in ("agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat",
                "robot0_gripper_qpos", "state"):  # fmt: skip
        np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    plain.end()
    env.close()


def stand_in(folder: Path) -> Path:
    """Empty folders in place of assets, for what loads no scene."""
    for name in ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures",
                 "turbosquid_objects"):  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
    return folder
