"""RoboTwin with a stand-in for the clone (robotwin_stand_in.py): the simulator itself needs assets and a GPU.

What the stand-in is taken to have is held against a real clone where ROBOTWIN_ROOT names one.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from training import envs
from training.envs import robotwin_scene
from training.envs.base import EpisodeRequest
from training.envs.robotwin import STEPS, RoboTwin
from training.envs.robotwin_clone import Clone
from vla.adapters.robotwin import ROOT_VARIABLE as VARIABLE
from vla.errors import SimrealError
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import Observation

HERE = Path(__file__).parent
TASK = "place_empty_cup"
TASK_FILE = """
from ._base_task import Base_Task

class {task}(Base_Task):
    def setup_demo(self, is_test=False, **kwags):
        super()._init_task_env_(**kwags)

    def get_info(self):
        return self.names()
"""
ROBOT = {"arm_joints_name": [[f"left{i}" for i in range(6)], [f"right{i}" for i in range(6)]]}
# What training/envs/robotwin_scene.py calls: name -> parameters it passes.
SURFACE = {
    "_init_task_env_": set(), "close_env": {"clear_cache"}, "play_once": set(), "check_success": set(),
    "take_action": {"action"}, "gen_sparse_reward_data": {"chunk_actions"}, "get_obs": set(), "_update_render": set(),
}  # fmt: skip


def write_clone(root: Path) -> Path:
    """A folder with the layout of the branch RLinf_support and the stand-in."""
    files: dict[str, Any] = {
        "envs/__init__.py": "", "envs/utils/__init__.py": "",
        "envs/utils/create_actor.py": "class UnStableError(Exception):\n    pass\n",
        "task_config/_camera_config.yml": {"D435": {"fovy": 37, "w": 320, "h": 240}},
        "task_config/_embodiment_config.yml": {"piper": {"file_path": "./assets/embodiments/piper"}},
        "task_config/_eval_step_limit.yml": {TASK: 500, "open_laptop": 700},
        "task_config/demo_randomized.yml": {
            "camera": {"head_camera_type": "D435", "wrist_camera_type": "D435", "collect_wrist_camera": True},
            "data_type": {"rgb": True, "depth": True}, "domain_randomization": {"random_light": True},
        },
        "assets/embodiments/piper/config.yml": ROBOT,
        "description/objects_description/021_cup/base0.json": {"seen": ["blue cup", "plastic cup"], "unseen": ["mug"]},
    }  # fmt: skip
    for task in [*STEPS, "open_laptop"]:
        files[f"envs/{task}.py"] = TASK_FILE.format(task=task)
        files[f"description/task_instruction/{task}.json"] = {
            "seen": ["Move {A} with {a}", "Shift {A}", "Put {B} away"], "unseen": ["Carry {A}"]
        }  # fmt: skip
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        dump = json.dumps if file.suffix == ".json" else yaml.safe_dump
        file.write_text(content if isinstance(content, str) else dump(content))
    shutil.copy(HERE / "robotwin_stand_in.py", root / "envs/_base_task.py")
    (root / "assets/objects").mkdir(parents=True)
    return root


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return write_clone(tmp_path / "RoboTwin")


@pytest.fixture
def env(clone: Path) -> Iterator[RoboTwin]:
    made = built(clone)
    yield made
    made.close()


def built(clone: Path, num_envs: int = 1, **settings: Any) -> RoboTwin:
    settings = {"feasible": "stable", "image_size": 32, "chunk": 5, **settings}
    made = envs.make("training.envs.robotwin:make", num_envs, root=str(clone), **settings)
    assert isinstance(made, RoboTwin)
    return made


def calls(clone: Path) -> Counter[str]:
    """What has taken place since the last time."""
    log = clone / "calls.log"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return Counter(lines)


def hold(joint: float = 0.1, gripper: float = 1.0, rows: int = 5) -> np.ndarray:
    """A chunk `[1, rows, 14]` that keeps the first left joint and the left gripper somewhere."""
    actions = np.zeros((1, rows, 14))
    actions[..., 0], actions[..., 6], actions[..., 13] = joint, gripper, 1.0
    return actions


def reach() -> np.ndarray:
    """A chunk that sweeps the first left joint over all goals, with the gripper closed from the second row on."""
    actions = hold(gripper=0.0, rows=25)
    actions[0, :, 0] = np.linspace(0.1, 1.1, 25)
    return actions


def bits(seen: Observation) -> bytes:
    parts = [*seen.images.values(), *seen.state.values()]
    return b"".join(part.tobytes() for part in parts) + seen.instruction.encode() + str(seen.stamps).encode()


def surface(root: Path) -> dict[str, set[str]]:
    """The methods of the base class with the names of their parameters; `**` for those that take any."""
    (base,) = [
        node for node in ast.parse((root / "envs/_base_task.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Base_Task"
    ]  # fmt: skip
    return {
        f.name: {a.arg for a in f.args.args} | ({"**"} if f.args.kwarg else set())
        for f in base.body if isinstance(f, ast.FunctionDef)
    }  # fmt: skip


def check_surface(root: Path, without: tuple[str, ...] = ()) -> None:
    found = surface(root)
    for name, parameters in SURFACE.items():
        if name not in without:
            assert name in found and parameters <= found[name], name
    assert "**" in found["_init_task_env_"]
    source = (root / "envs/_base_task.py").read_text()
    for attribute in ("step_lim", "plan_success", "eval_success", "cameras"):
        assert f"self.{attribute}" in source, attribute
    assert "class UnStableError" in (root / "envs/utils/create_actor.py").read_text()
    for task in STEPS:
        assert task in Clone(str(root)).tasks
        source = (root / f"envs/{task}.py").read_text()
        assert f"class {task}(" in source and "def setup_demo(self" in source


@pytest.mark.parametrize("root", [None, *filter(None, [os.environ.get(VARIABLE)])])
def test_what_is_used_of_a_clone_is_there(clone: Path, root: str | None) -> None:
    """In the stand-in, and in RoboTwin itself where the variable names a clone."""
    if root is None:
        check_surface(clone)
        return
    real = Clone(root)
    check_surface(real.root, () if real.plays_whole_chunks else ("gen_sparse_reward_data",))
    assert {"D435"} <= set(yaml.safe_load((real.configs / "_camera_config.yml").read_text()))
    told = yaml.safe_load((real.configs / "demo_randomized.yml").read_text())
    assert {"head_camera_type", "wrist_camera_type"} <= set(told["camera"]) and "domain_randomization" in told
    for task in STEPS:
        assert real.step_limit(task) >= STEPS[task]
        for kind in ("seen", "unseen"):
            assert real.templates(task, kind)
    assert len(real.vocabulary([TASK])) > 1000


def test_a_scene_needs_nothing_but_numpy() -> None:
    """RoboTwin's interpreter has none of this project's packages."""
    found = {
        name.partition(".")[0] for node in ast.walk(ast.parse(Path(robotwin_scene.__file__).read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [str(node.module)] if isinstance(node, ast.ImportFrom) else [])
    }  # fmt: skip
    assert found - sys.stdlib_module_names == {"numpy"}


def test_it_offers_the_published_contract(clone: Path) -> None:
    before = os.getcwd(), [*sys.path]
    env = built(clone, image_size=224, chunk=25)
    action, (camera,) = env.contract.action, env.contract.cameras
    assert (action.control_mode, action.dim, action.grippers, action.chunk) == ("joint", 14, (6, 13), 25)
    assert (camera.name, camera.height, camera.width) == ("head", 224, 224)
    assert camera.fov_y_deg == pytest.approx(35.2, abs=0.1)  # 37 degrees, of which a tenth of the surface is cut
    assert [field.size for field in env.contract.state] == [6, 1, 6, 1]
    assert env.axes["tasks"] == tuple(STEPS) and env.max_steps == 400
    assert "Shift {A}" in env.instructions and "blue cup" in env.instructions
    env.reset(0, EpisodeRequest(1, TASK))
    (seen,) = env.observe([0])
    assert seen.images["head"].shape == (224, 224, 3) and seen.state["left_gripper_opening"].tolist() == [1.0]
    assert (os.getcwd(), sys.path) == before and "envs" not in sys.modules  # the clone stays in its own process
    env.close()
    wrists = built(clone, cameras=["head", "left_wrist", "right_wrist"], image_size=None, area=1.0)
    assert [(c.role, c.height, c.width) for c in wrists.contract.cameras] == [
        ("third_person", 240, 320), ("wrist", 240, 320), ("wrist", 240, 320)
    ]  # fmt: skip
    wrists.reset(0, EpisodeRequest(1, TASK))
    assert [*wrists.observe([0])[0].images] == ["head", "left_wrist", "right_wrist"]
    wrists.close()


def test_the_same_request_gives_the_same_episode(clone: Path) -> None:
    env = built(clone, num_envs=2, chunk=2)

    def play(index: int, seed: int, looks: int = 1) -> list[bytes]:
        env.reset(index, EpisodeRequest(seed, TASK))
        found = [bits(env.observe([index])[0])]
        for joint in (0.05, 0.1):
            env.step([index], hold(joint, rows=2))
            for _ in range(looks):
                seen = env.observe([index])[0]
                env.picture(index)
            found.append(bits(seen))
        return found

    first = play(0, 7)
    assert play(1, 12) != first
    assert play(0, 7) == first and play(1, 7, looks=3) == first
    env.reset(0, EpisodeRequest(7, TASK))
    for joint in (0.05, 0.1):
        env.step([0], hold(joint, rows=2))
    assert bits(env.observe([0])[0]) == first[-1]  # looking leaves no trace
    assert len(set(first)) == 3
    env.close()


def test_scenes_that_cannot_be_played_are_passed_over(clone: Path) -> None:
    env = built(clone, feasible="expert")
    goals = []
    for seed in (2, 3, 4, 5):  # of each five one is unstable and one the expert fails at
        env.reset(0, EpisodeRequest(seed, TASK))
        goals.append(bits(env.observe([0])[0]))
        setups = calls(clone)
        assert (setups["expert"], setups["setup"]) == {2: (1, 2), 3: (1, 3), 4: (2, 4), 5: (1, 2)}.get(seed), seed
    assert len(set(goals)) == 4  # neighbours do not come upon the same scene
    env.close()
    listed = clone / "seeds.json"
    listed.write_text(json.dumps({TASK: {"success_seeds": [11, 13, 16]}, "lift_pot": [20]}))
    env = built(clone, seeds=str(listed), tasks=[TASK, "lift_pot"])
    seen = []
    for seed in (0, 1, 2, 3):
        env.reset(0, EpisodeRequest(seed, TASK))
        seen.append(bits(env.observe([0])[0]))
    assert seen[0] == seen[3] and seen[1] == seen[2] != seen[0]  # 13 turns out unstable, and 16 is next
    assert not calls(clone)["expert"]
    env.close()


def test_a_chunk_is_played_without_a_picture(env: RoboTwin, clone: Path) -> None:
    env.reset(0, EpisodeRequest(1, TASK))
    env.observe([0])
    assert calls(clone) == {"setup": 1, "picture": 1, "render": 1}
    for trajectory in (True, False):
        env.slots[0].whole = trajectory
        env.step([0], hold())
        assert not calls(clone)
        env.observe([0])
        env.observe([0])
        assert calls(clone) == {"picture": 1, "render": 1}
    assert env.picture(0, 24).shape == (24, 24, 3)
    assert calls(clone) == {"observer": 1, "render": 1}


@pytest.mark.parametrize("trajectory", ["chunk", "row"])
def test_a_success_ends_the_episode(clone: Path, trajectory: str) -> None:
    env = built(clone, chunk=25, trajectory=trajectory)
    env.reset(0, EpisodeRequest(1, TASK))
    result = env.step([0], reach())
    assert (result.success[0], result.terminated[0], result.truncated[0]) == (True, True, False)
    steps = int(result.executed.sum())
    assert result.executed[0, :steps].all() and result.rewards.dtype == np.float32
    assert result.rewards[0, steps - 1] == 1.0 == result.rewards.sum()
    assert steps == 25 if trajectory == "chunk" else 1 < steps < 25  # RoboTwin does not tell when in a trajectory
    assert env.observe([0])[0].stamps["head"] == pytest.approx(steps * 15 / 250)
    before = calls(clone)
    assert before["picture"] == 1
    again = env.step([0], reach())
    assert not again.executed.any() and again.terminated[0] and not calls(clone)
    env.close()


def test_the_time_limit_cuts_a_chunk(clone: Path) -> None:
    env = built(clone, max_episode_steps=7)
    with pytest.raises(ValueError, match="plays no episode"):
        env.step([0], hold())
    env.reset(0, EpisodeRequest(1, TASK))
    assert env.step([0], hold()).executed.sum() == 5
    result = env.step([0], hold())
    assert result.executed.tolist() == [[True, True, False, False, False]]
    assert (result.truncated[0], result.terminated[0], result.success[0]) == (True, False, False)
    env.close()


def test_a_refused_batch_changes_nothing(clone: Path) -> None:
    env = built(clone, num_envs=2)
    for index in (0, 1):
        env.reset(index, EpisodeRequest(1, TASK))
    before = [bits(seen) for seen in env.observe([0, 1])]
    bad = np.concatenate([hold(0.5), hold(np.nan)])
    for actions, message in ((bad, "14 finite numbers"), (bad[..., :7], "14 finite"), (hold(), "one row for each")):
        with pytest.raises(ValueError, match=message):
            env.step([0, 1], actions)
    assert [bits(seen) for seen in env.observe([0, 1])] == before
    env.close()


def test_a_lost_process_cuts_one_episode_alone(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    env = built(clone, num_envs=2, patience_s=5.0)
    for index in (0, 1):
        env.reset(index, EpisodeRequest(index, TASK))
    seen = env.observe([0, 1])
    result = env.step([0, 1], np.concatenate([hold(99.0), hold()]))
    assert result.truncated.tolist() == [True, False] and result.executed.sum(1).tolist() == [0, 5]
    assert "killed by signal 11" in capfd.readouterr().err and env.slots[0].losses
    assert bits(env.observe([0])[0]) == bits(seen[0])  # the last that anybody saw
    assert env.picture(0).any() and not env.step([0], hold()).executed.any()
    env.reset(0, EpisodeRequest(0, TASK))
    assert bits(env.observe([0])[0]) == bits(seen[0])
    begun = time.monotonic()
    assert env.step([0], hold(-99.0)).truncated[0]  # it hangs
    assert 4 < time.monotonic() - begun < 15 and "no answer within 5 s" in env.slots[0].losses[-1]
    env.close()


def test_a_process_lost_before_the_first_action_is_begun_again(clone: Path) -> None:
    env = built(clone)
    env.reset(0, EpisodeRequest(1, TASK))
    whole = bits(env.observe([0])[0])
    for moment in ("crash_setup", "crash_picture"):
        (clone / moment).touch()
        env.reset(0, EpisodeRequest(1, TASK))
        assert bits(env.observe([0])[0]) == whole and not (clone / moment).exists()
    assert len(env.slots[0].losses) == 2 and "exit code 3" in env.slots[0].losses[0]
    (clone / "envs" / f"{TASK}.py").write_text("import os\nos._exit(4)\n")
    env.close()
    env.reset(0, EpisodeRequest(1, TASK))
    with pytest.raises(SimrealError, match="exit code 4") as caught:
        env.observe([0])
    assert caught.value.code == "ROBOTWIN_PROCESS"


def test_sentences_are_those_of_the_scene(env: RoboTwin) -> None:
    told: dict[str, set[str]] = {TASK: set(), TASK + "/unseen": set()}
    for variant, sentences in told.items():
        for seed in range(0, 60, 5):
            env.reset(0, EpisodeRequest(seed, variant))
            sentences.add(env.observe([0])[0].instruction)
    cups, arms = ("the blue cup", "the plastic cup"), ("the left arm", "the right arm")
    assert told[TASK] <= {f"Move {c} with {a}" for c in cups for a in arms} | {f"Shift {c}" for c in cups}
    assert len(told[TASK]) > 3 and told[TASK + "/unseen"] == {"Carry the mug"}


def test_what_is_wrong_is_told(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SimrealError, match=r"env.settings.root=FOLDER or ROBOTWIN_ROOT.*git clone") as caught:
        envs.make("training.envs.robotwin:make", 1)
    assert caught.value.code == "ROBOTWIN_ROOT"
    for settings, message in (
        ({"tasks": ["lift_pott"]}, "did you mean 'lift_pot'"), ({"setting": "demo_random"}, "'demo_randomized'"),
        ({"embodiment": ["pipper"]}, "did you mean 'piper'"), ({"embodiment": ["piper", "piper"]}, "aloha-agilex"),
        ({"seeds": str(clone / "none.json")}, "env.settings.seeds"), ({"cameras": []}, "one camera at least"),
    ):  # fmt: skip
        with pytest.raises(SimrealError, match=message):
            built(clone, **settings)
    env = built(clone)
    with pytest.raises(SimrealError, match="did you mean 'lift_pot'"):
        env.reset(0, EpisodeRequest(0, "lift_pt"))
    (clone / "broken").touch()
    env.reset(0, EpisodeRequest(0, TASK))
    with pytest.raises(SimrealError, match="RoboTwin fails: FileNotFoundError: objects/021_cup"):
        env.observe([0])
    env.close()
    other = built(clone, python="/nowhere/python")
    with pytest.raises(SimrealError, match="interpreter does not start"):
        other.reset(0, EpisodeRequest(0, TASK))
    shutil.rmtree(clone / "assets/objects")
    with pytest.raises(SimrealError, match=r"assets/objects\n.*_download_assets.sh") as caught:
        built(clone)
    assert caught.value.code == "ROBOTWIN_ASSETS"
    with pytest.raises(SimrealError, match="is no clone of RoboTwin 2"):
        built(clone / "envs")
    source = (clone / "envs/_base_task.py").read_text().replace("gen_sparse_reward_data", "gen_reward")
    (clone / "assets/objects").mkdir()
    (clone / "envs/_base_task.py").write_text(source)
    with pytest.raises(SimrealError, match="trajectory=row"):
        built(clone)
    built(clone, trajectory="row")


def bundle(clone: Path, out: Path) -> None:
    """A small policy of two arms with random weights, whose statistics spread over joints and grippers."""
    env = built(clone)
    contract = env.contract
    env.close()
    low, high = np.full(14, -1.5), np.full(14, 1.5)
    low[[6, 13]], high[[6, 13]] = 0.0, 1.0
    numbers = ArrayStatistics.from_bounds(low.tolist(), high.tolist())
    model = {
        "class": "nano", "vision": {"image_size": 32, "widths": [8, 8], "keypoints": 4}, "cameras": 1, "state_dim": 14,
        "prompt_length": 48, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "chunk": 5, "action_dim": 14,
        "tokens_per_placeholder": 7, "n_bins": 16, "auxiliary": 0, "pointing": 0, "values": 1,
    }  # fmt: skip
    words = train_tokenizer(["move the blue cup with the left arm", "shift the plastic cup"], 512, 48)
    Policy.untrained(model, contract, Statistics(numbers, numbers), words, 0).save(out)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_and_scoring_with_two_arms(clone: Path, tmp_path: Path) -> None:
    bundle(clone, tmp_path / "start")
    small = {"root": str(clone), "feasible": "stable", "image_size": 32, "chunk": 5, "max_episode_steps": 10}
    where = ["env=robotwin", *(f"env.settings.{key}={value}" for key, value in small.items())]

    def vla(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "vla", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    vla(
        "train", *where, f"checkpoint={tmp_path}/start", f"out={tmp_path}/run", "iterations=1", "slots=2",
        "decisions=4", "algorithm=ppo", "algorithm.minibatches=1", "algorithm.critic_iterations=0",
        "placement.environment_workers=1", "placement.policy_threads=1", "placement.learners=1",
    )  # fmt: skip
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["rollout/env_steps"] == 30, "two slots, of four decisions one shows the end of an episode"
    assert row["train/rollout_logprob_gap_max"] < 1e-4
    vla(
        "eval", *where, f"checkpoint={tmp_path}/run/checkpoint", f"out={tmp_path}/scores.json", "suite=tasks",
        "tasks=[2,5]", "episodes=1", "workers=1", "batch=1",
    )  # fmt: skip
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [*found["variants"]] == ["place_empty_cup", "lift_pot"] and found["axes"]["tasks"]["episodes"] == 2
