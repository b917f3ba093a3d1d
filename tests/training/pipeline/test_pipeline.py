"""Shared memory, bells, and the engine with real Ray workers: schedules, and workers that fail."""

import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_env import point_contract, untrained
from safetensors.torch import load_file

from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import ray_session
from training.pipeline.bell import ABORT, Bell, PipelineAborted, PipelineTimeout
from training.pipeline.block import ALIGNMENT, RolloutBlock, RolloutShape, unlink
from training.pipeline.placement import EngineError, PlacementConfig, plan
from training.pipeline.synchronous import Synchronous
from vla.contract import ContractError
from vla.errors import SimrealError
from vla.lora import FULL, Lora
from vla.policy import Policy

SHAPE = RolloutShape(3, 2, (1, 4, 4, 3), 5, 6, chunk=2, action_dim=4, values=1, privileged=0, critic=3)
SLOTS, DECISIONS = 7, 8  # 7: the parts are of different sizes
SETTINGS = {"image_size": 16, "chunk": 2}


@pytest.fixture
def block(tmp_path: Path) -> Iterator[RolloutBlock]:
    made = RolloutBlock(SHAPE, f"simreal_test_{tmp_path.name}_{time.time_ns()}", create=True)
    yield made
    made.close()
    unlink(made.name)


def test_arrays_are_aligned_and_do_not_overlap(block: RolloutBlock) -> None:
    starts = {k: a.__array_interface__["data"][0] for k, a in block.arrays.items()}
    first = min(starts.values())
    assert all((start - first) % ALIGNMENT == 0 for start in starts.values())
    for number, array in enumerate(block.arrays.values()):
        array[...] = number % 2 if array.dtype == np.bool_ else number
    for number, array in enumerate(block.arrays.values()):
        assert (array == (number % 2 if array.dtype == np.bool_ else number)).all()
    used = max(starts[k] + a.nbytes for k, a in block.arrays.items()) - first
    assert used <= SHAPE.nbytes < used + ALIGNMENT


def test_another_process_writes_in_place(block: RolloutBlock) -> None:
    code = f"""
from training.pipeline.block import RolloutBlock, RolloutShape
block = RolloutBlock({SHAPE!r}, {block.name!r})
block["state"][3, 1] = 1, 2, 3, 4, 5
block["executed"][2, 0] = True
block.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert block["state"][3, 1].tolist() == [1, 2, 3, 4, 5]
    assert block["executed"].sum() == 2
    assert block["executed"][2, 0].all()


def test_carry_over_makes_the_last_row_the_first(block: RolloutBlock) -> None:
    for name, array in block.arrays.items():
        array[...] = np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) % (2 if name == "boundary" else 99)
    block.carry_over()
    for name in ("images", "state", "tokens", "action_tokens", "log_probs", "values"):
        assert (block[name][0] == 3).all()
        assert (block[name][1] == 1).all()
    assert block["boundary"][0].all()
    for name in ("rewards", "executed", "terminated", "truncated"):
        assert not block[name].any()
    block.clear()
    assert not any(array.any() for name, array in block.arrays.items() if name != "images")


def test_bell_delivers_in_order_gives_up_and_forgets(tmp_path: Path) -> None:
    bell, other_end = Bell(tmp_path / "bell"), Bell(tmp_path / "bell")
    other_end.ring(1, 2, 3)
    other_end.ring(4, 5, 6)
    assert bell.wait(1) == (1, 2, 3)
    assert bell.wait(1) == (4, 5, 6)
    began = time.monotonic()
    assert bell.wait(0.1) is None
    assert 0.09 < time.monotonic() - began < 2
    other_end.ring(*ABORT)
    with pytest.raises(PipelineAborted):
        bell.wait(1)
    other_end.ring(7, 8, 9)
    bell.drain()
    assert bell.wait(0) is None
    bell.close()
    other_end.close()


def test_a_missed_deadline_says_who_waits_for_whom() -> None:
    error = PipelineTimeout("the policy worker", (1, 3), 2.5, "stage 0, decision 4")
    for found in (error, pickle.loads(pickle.dumps(error))):
        assert "the policy worker waited 2.5 s for environment worker 1, environment worker 3" in str(found)
        assert "stage 0, decision 4" in str(found)
        assert found.missing == (1, 3)


def test_round_trip_between_two_processes(tmp_path: Path) -> None:
    count = 500
    there, back = Bell(tmp_path / "there"), Bell(tmp_path / "back")
    code = f"""
from pathlib import Path
from training.pipeline.bell import Bell
there, back = Bell(Path({str(there.path)!r})), Bell(Path({str(back.path)!r}))
back.ring(0, 0, -2)
for _ in range({count}):
    back.ring(*there.wait(60))
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert back.wait(60) == (0, 0, -2)
        seconds = []
        for number in range(count):
            began = time.perf_counter()
            there.ring(1, 0, number)
            assert back.wait(60) == (1, 0, number)
            seconds.append(time.perf_counter() - began)
        assert child.wait(60) == 0
    finally:
        child.kill()
    median = 1000 * statistics.median(seconds)
    print(f"round trip over bells: median {median:.3f} ms, 99% {1000 * np.quantile(seconds, 0.99):.3f} ms")
    assert median < 5


def fits(checkpoint: Path, slots: int = SLOTS, settings: dict[str, int] = SETTINGS, **placement: Any) -> None:
    algorithm, where = PPOConfig(minibatches=2), PlacementConfig(**{"learners": 1, **placement})
    plan(checkpoint, "point_env:make", settings, slots, DECISIONS, algorithm, where)


def test_a_plan_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    fits(checkpoint)
    with pytest.raises(EngineError, match="3 environments can't be split over 2 workers x 2 stages"):
        fits(checkpoint, slots=3, stages=2)
    with pytest.raises(EngineError, match="28 samples at worst, too few for 2 minibatches on 15 learners"):
        fits(checkpoint, learners=15)
    with pytest.raises(EngineError, match="2 environment workers can't be split over 3 policy workers"):
        fits(checkpoint, policy_workers=3)
    with pytest.raises(EngineError, match="there is no learner"):
        fits(checkpoint, learners=0)
    fits(checkpoint, schedule="asynchronous", policy_workers=2, slots=8)
    with pytest.raises(ContractError) as caught:
        fits(checkpoint, settings={"image_size": 32, "chunk": 3})
    assert caught.value.codes == ("CAMERA_SIZE", "ACTION_CHUNK")
    assert point_contract().action.chunk == 2


def test_a_privileged_critic_needs_an_environment_that_tells_its_state(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("point_env.CRITIC", 0)
    algorithm = PPOConfig(minibatches=2, critic="privileged")
    with pytest.raises(EngineError, match="no state for a privileged critic") as caught:
        plan(checkpoint, "point_env:make", SETTINGS, SLOTS, DECISIONS, algorithm, PlacementConfig(learners=1))
    assert "algorithm=ppo" in caught.value.remedy


def test_a_model_has_to_fit_the_way_its_vision_is_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(tmp_path / "checkpoint", auxiliary=3)

    def planned(**algorithm: Any) -> None:
        config = PPOConfig(minibatches=2, **algorithm)
        plan(tmp_path / "checkpoint", "point_env:make", SETTINGS, SLOTS, DECISIONS, config, PlacementConfig(learners=1))

    planned(train_vision=False)  # this environment tells no positions at all: there is no auxiliary phase
    monkeypatch.setattr("point_env.PRIVILEGED", 5)
    with pytest.raises(
        EngineError, match="auxiliary output has 3 numbers, environment point_env:make tells 5"
    ) as caught:
        planned()
    assert "perception_steps=0" in caught.value.remedy
    planned(perception_steps=0)
    monkeypatch.delattr("vla.models.openvla.OpenVLA.blocks")
    with pytest.raises(EngineError, match="does not tell its `blocks`"):
        fits(tmp_path / "checkpoint", compile=True)
    monkeypatch.delattr("vla.models.openvla.OpenVLA.see")
    with pytest.raises(EngineError, match="OpenVLA has no `see`") as caught:
        planned(perception_steps=0, train_vision=False)
    assert "train_vision=true" in caught.value.remedy


@pytest.fixture(scope="module")
def ray_() -> Iterator[None]:
    with ray_session():
        yield


def engine(
    checkpoint: Path, run: Path, stages: int, deadline_s: float = 60, lora: Lora = FULL, policies: int = 1,
    **settings: str,
) -> Synchronous:  # fmt: skip
    placement = PlacementConfig(
        environment_workers=2, stages=stages, policy_workers=policies, policy_threads=1, learners=1,
        deadline_s=deadline_s,
    )  # fmt: skip
    return Synchronous(
        checkpoint, run, "point_env:make", {**SETTINGS, **settings}, "in_distribution", SLOTS, DECISIONS,
        PPOConfig(minibatches=2), placement, 3, 10, lora,
    )  # fmt: skip


def play(made: Synchronous, iterations: int) -> tuple[list[dict[str, np.ndarray]], list[list[float]]]:
    """What the block holds after each iteration, and the returns of the finished episodes of each worker."""
    seen, returns = [], []
    for iteration in range(iterations):
        rollout = made.rollout(iteration)
        seen.append({k: v.copy() for k, v in made.block.arrays.items()})
        returns += [sorted(log.returns) for log in rollout.episodes]
    return seen, returns


def test_sequential_and_pipelined_schedules_play_the_same(ray_: None, checkpoint: Path, tmp_path: Path) -> None:
    played = []
    for stages, policies in ((1, 1), (2, 2)):  # with two policy workers, each serves one environment worker
        made = engine(checkpoint, tmp_path / str(stages), stages, policies=policies)
        try:
            played.append((*play(made, 3), made.counters()))
        finally:
            made.close()
    (sequential, returns, begun), (pipelined, other_returns, other_begun) = played
    for iteration, (a, b) in enumerate(zip(sequential, pipelined, strict=True)):
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), f"{name} in iteration {iteration}"
    assert returns == other_returns
    assert begun.tolist() == other_begun.tolist()
    # Episodes really began, ended in both ways, and went on from one iteration into the next.
    assert begun.min() >= 3
    assert all(any(a[name].any() for a in sequential) for name in ("terminated", "truncated", "boundary"))
    # The critic is told the state before every action: position and clock of the point.
    for arrays in sequential:
        states, executed = arrays["critic_states"], arrays["executed"]
        assert states[:, :, 0, 0].clip(-1, 1) == pytest.approx(arrays["state"][:, :, 0], abs=0.02)  # normalised
        both = executed.all(-1)
        assert both.any()
        assert (states[:-1][both][:, 1, 1] - states[:-1][both][:, 0, 1]) == pytest.approx(1 / 12, abs=1e-6)
    assert (sequential[1]["state"][0] == sequential[0]["state"][-1]).all()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_sharded_learners_learn_what_whole_ones_learn(ray_: None, checkpoint: Path, tmp_path: Path, rank: int) -> None:
    """And their states are read by any number of them."""
    lora = Lora(rank=rank, target=r"language_model\.layers.*(q_proj|v_proj)") if rank else FULL
    algorithm = PPOConfig(minibatches=2, critic_iterations=0, perception_steps=0, learning_rate=3e-3)

    def train(name: str, learners: int, shard: bool, first: int = 0, state: Path | None = None) -> Path:
        placement = PlacementConfig(learners=learners, shard=shard, micro_batch=5, environment_workers=1)
        made = Synchronous(
            checkpoint, tmp_path / name, "point_env:make", SETTINGS, "in_distribution", SLOTS, DECISIONS, algorithm,
            placement, 3, 10, lora,
        )  # fmt: skip
        try:
            if state is not None:
                made.restore(state, first, [20] * SLOTS)
            for iteration in range(first, 2):
                made.iterate(iteration)
                if iteration == 0:
                    (tmp_path / name / "state").mkdir()
                    made.save(tmp_path / name / "state")
            made.export(tmp_path / name / "out", {}, {})
        finally:
            made.close()
        return tmp_path / name

    def weights(run: Path) -> dict[str, torch.Tensor]:
        return load_file(run / "out" / "model.safetensors")

    whole, sharded = train("whole", 2, False), train("sharded", 2, True)
    start = load_file(checkpoint / "model.safetensors")
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(sharded)[name], atol=2e-4), name
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in weights(whole).items())
    parts = sorted(p.name for p in (sharded / "state").iterdir())
    assert parts == (["learner.safetensors"] if rank else [f"learner.{i:04d}-of-0002.safetensors" for i in (0, 1)])
    if not rank:
        again = [weights(train(f"restored{n}", n, True, 2, sharded / "state")) for n in (2, 3)]  # no more iterations
        assert all(torch.equal(value, again[1][name]) for name, value in again[0].items())
        train("goes on", 3, True, 1, sharded / "state")
        (sharded / "state" / parts[1]).unlink()
        with pytest.raises(SimrealError, match="1 of 2 parts of learner"):
            train("lost", 2, True, 1, sharded / "state")


def test_failing_environment_workers_are_named_replaced_and_the_run_goes_on(
    ray_: None, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    made = engine(checkpoint, tmp_path / "run", 2, deadline_s=6, trouble=str(trouble))
    try:
        made.rollout(0)
        reasons = {
            "exit": "its process died",
            "raise": "it raised RuntimeError: the gripper fell off",
            "hang": "policy worker 0 waited 6 s for {name}",
            "reset": "it raised RuntimeError: no such scene",
        }
        for iteration, (kind, reason) in enumerate(reasons.items(), 1):
            before = dict(made.processes)
            begun = made.counters()
            if kind == "reset":
                made.fresh = True  # its very first reset of the iteration fails
            capfd.readouterr()
            (trouble / kind).touch()
            began = time.monotonic()
            rollout = made.rollout(iteration)
            assert time.monotonic() - began < 40
            culprit = int((trouble / f"{kind}.done").read_text())
            name = next(name for name, process in before.items() if process == culprit)
            said = capfd.readouterr().out
            assert f"{name} (process {culprit}) is restarted: {reason.format(name=name)}" in said
            assert said.count("is restarted") == 1
            assert {k for k in before if before[k] != made.processes[k]} == {name}
            assert (made.counters() > begun).all()  # other episodes than before
            assert [len(log.begun) for log in rollout.episodes] == [4, 3]
            assert made.block["executed"].any(-1).sum() + made.block["boundary"][:-1].sum() == SLOTS * DECISIONS
            assert np.isfinite(made.update(iteration).metrics["loss"])
    finally:
        made.close()


def test_with_adapters_nothing_else_is_trained_sent_and_saved(ray_: None, checkpoint: Path, tmp_path: Path) -> None:
    made = engine(checkpoint, tmp_path / "run", 1, lora=Lora(rank=2))
    try:
        for iteration in range(PPOConfig().critic_iterations + 1):
            rollout = made.rollout(iteration)
            update = made.update(iteration)
            assert np.isfinite(update.metrics["loss"]) and rollout.episodes
        layout = plan(
            checkpoint, "point_env:make", SETTINGS, SLOTS, DECISIONS, PPOConfig(minibatches=2), made.placement, Lora(2)
        ).weights
        weights = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in layout.tensors.items()}
        assert made.weights.read(weights) == iteration + 1
        assert all(".lora_" in name or name.startswith(("value_head.", "proprio", "action_head.")) for name in weights)
        assert any(".lora_B." in name and bool(value.any()) for name, value in weights.items())
        (tmp_path / "state").mkdir()
        made.save(tmp_path / "state")
        made.export(tmp_path / "bundle", {}, {})
    finally:
        made.close()
    before, after = (Policy.load(folder, None).model.state_dict() for folder in (checkpoint, tmp_path / "bundle"))
    assert before.keys() == after.keys()  # merged
    changed = {name for name in before if not (before[name] == after[name]).all()}
    layers = {name.split(".lora_")[0] + ".weight" for name in weights if ".lora_" in name}
    assert changed >= layers and all(n in layers or n in weights for n in changed)
    stored = load_file(tmp_path / "state" / "learner.safetensors")
    assert sum(name.startswith("module.") for name in stored) == len(weights)
