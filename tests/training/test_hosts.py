"""Training over several hosts: two nodes of a Ray cluster on this machine, and one with a network of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray_nodes
import torch
from safetensors.torch import load_file

from training.algorithms.ppo import PPOConfig
from training.pipeline import placement as placements
from training.pipeline.actors import ray_session
from training.pipeline.cluster import ClusterError, connect
from training.pipeline.crew import Crew, Node, Place
from training.pipeline.engine import name_of
from training.pipeline.placement import EngineError, PlacementConfig
from training.pipeline.synchronous import Synchronous
from vla.lora import FULL, Lora

SLOTS, DECISIONS = 7, 8  # 4 slots on the first host, 3 on the other
SETTINGS = {"image_size": 16, "chunk": 2}
LEARNS = PPOConfig(minibatches=2, critic_iterations=0, perception_steps=0, learning_rate=3e-3)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with ray_nodes.head() as address:
        yield address


@pytest.fixture(scope="module")
def session(cluster: str) -> Iterator[list[Node]]:
    """A connection to the head, and another node."""
    with ray_nodes.another(cluster), ray_session(cluster) as nodes:
        assert len(nodes) == 2 and [node.is_here for node in nodes] == [True, False]
        yield nodes


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder. Nodes that are killed leave their shared memory behind: here their machine goes on."""
    folder = tmp_path / "run"
    yield folder
    for place in ("/dev/shm", tempfile.gettempdir()):
        for left in Path(place).glob(f"{name_of(folder)}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def engine(
    checkpoint: Path, run: Path, nodes: Sequence[Node], lora: Lora = FULL, stages: int = 1, pause_s: float = 0.0,
    learners: int = 1, shard: bool = False,
) -> Synchronous:  # fmt: skip
    placement = PlacementConfig(
        environment_workers=2, stages=stages, policy_threads=1, learners=learners, shard=shard, deadline_s=20
    )
    return Synchronous(
        checkpoint, run, "point_env:make", {**SETTINGS, "pause_s": pause_s}, "in_distribution", SLOTS, DECISIONS,
        LEARNS, placement, 3, 10, lora, nodes,
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_play_what_one_plays(session: list[Node], checkpoint: Path, tmp_path: Path) -> None:
    played = []
    for name, nodes, stages in (("one", session[:1], 2), ("two", session, 2)):
        made = engine(checkpoint, tmp_path / name, nodes, stages=stages)
        try:
            seen, returns = [], []
            for iteration in range(3):
                rollout = made.rollout(iteration)
                assert rollout.measures["rollout/slots"] == SLOTS
                seen.append({k: v.copy() for k, v in made.block.arrays.items()})
                returns += [sorted(log.returns) for log in rollout.episodes]
            played.append((seen, returns, made.counters().tolist()))
            assert len(made.policies) == len(nodes)
        finally:
            made.close()
    (one, *rest), (two, *others) = played
    for iteration, (a, b) in enumerate(zip(one, two, strict=True)):
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), f"{name} in iteration {iteration}"
    assert rest == others
    assert one[2]["executed"].any() and one[2]["images"][:, 4:].any()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_an_update_reaches_the_policy_of_the_other_host(
    session: list[Node], checkpoint: Path, tmp_path: Path, rank: int
) -> None:
    made = engine(checkpoint, tmp_path / "run", session, lora=Lora(rank=rank) if rank else FULL)
    try:
        for iteration in range(3):
            made.rollout(iteration)
            versions = made.block["versions"]
            assert (versions[1:] == iteration).all(), versions  # the first row was decided before the update
            assert np.isfinite(made.update(iteration).metrics["loss"])
        (tmp_path / "state").mkdir()
        made.save(tmp_path / "state")
        made.restore(tmp_path / "state", 3, [20] * SLOTS)
        made.rollout(3)
        assert (made.block["versions"][1:] == 3).all()
    finally:
        made.close()


@pytest.mark.slow
def test_learners_may_be_where_the_command_is_not(session: list[Node], checkpoint: Path, tmp_path: Path) -> None:
    here, other = session
    made = engine(checkpoint, tmp_path / "run", [other, here])
    try:
        assert made.hosts.first_learner.node == other
        for iteration in range(2):
            made.rollout(iteration)
            assert (made.block["versions"][1:] == iteration).all()
            assert made.block["versions"].shape[1] == 3  # its own slots alone
            assert np.isfinite(made.update(iteration).metrics["loss"])
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_learners_on_two_hosts_learn_what_those_of_one_learn(
    session: list[Node], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: bool
) -> None:
    weights = []
    for places in ((Place(0), Place(0)), (Place(0), Place(1))):
        crew = Crew((Place(0), Place(1)), (Place(0), Place(1)), places)
        monkeypatch.setattr(placements, "man", lambda *_, crew=crew: crew)
        run = tmp_path / str(len(weights))
        made = engine(checkpoint, run, session, learners=2, shard=shard)
        try:
            for iteration in range(2):
                made.iterate(iteration)
            made.export(run / "out", {}, {})
        finally:
            made.close()
        weights.append(load_file(run / "out" / "model.safetensors"))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-4), name


@pytest.mark.slow
def test_a_lost_node_shrinks_the_run(
    cluster: str, session: list[Node], checkpoint: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {node.id for node in session}
    with ray_nodes.another(cluster) as third:
        nodes = [session[0], *(node for node in current() if node.id not in known)]
        assert len(nodes) == 2
        made = engine(checkpoint, run, nodes, pause_s=0.1)
        try:
            made.rollout(0)
            made.update(0)
            begun = made.counters()
            killer = threading.Timer(0.4, third.kill)
            killer.start()
            began = time.monotonic()
            rollout = made.rollout(1)
            print(f"begun anew {time.monotonic() - began:.1f} s after the rollout began")
            killer.join()
            said = capfd.readouterr().out
            what = "is lost with environment worker 1, policy worker 1: the run goes on with 4 of 7 environments"
            assert what in said
            assert rollout.measures["rollout/slots"] == 4 and len(rollout.episodes) == 1
            assert "environment worker 1" not in made.processes
            assert (made.counters() > begun).all()
            played = made.block["executed"].any(-1)
            assert played[:, :4].any() and not played[:, 4:].any() and made.block["boundary"][:, 4:].all()
            for iteration in (1, 2):
                assert np.isfinite(made.update(iteration).metrics["loss"])
                rollout = made.rollout(iteration + 1)
                assert rollout.measures["rollout/slots"] == 4
                assert (made.block["versions"][1:, :4] == iteration + 1).all()
        finally:
            made.close()


@pytest.mark.slow
def test_the_loss_of_the_learners_is_an_error_that_can_be_resumed(
    cluster: str, session: list[Node], checkpoint: Path, run: Path
) -> None:
    known = {node.id for node in session}
    with ray_nodes.another(cluster) as third:
        nodes = [*(node for node in current() if node.id not in known), session[0]]
        made = engine(checkpoint, run, nodes)
        try:
            made.rollout(0)
            third.kill()
            with pytest.raises(EngineError, match=r"of learners is lost") as caught:
                made.rollout(1)
            assert caught.value.code == "NODE" and "same command" in caught.value.remedy
        finally:
            made.close()


def current() -> list[Node]:
    from training.pipeline.cluster import nodes

    return nodes()


@pytest.mark.slow
def test_the_asynchronous_schedule_stays_on_one_host(session: list[Node], checkpoint: Path) -> None:
    algorithm = PPOConfig(minibatches=2)
    placement = PlacementConfig(schedule="asynchronous", learners=1)
    with pytest.raises(EngineError, match="asynchronous schedule works on the node of the command alone"):
        placements.plan(checkpoint, "point_env:make", SETTINGS, 8, DECISIONS, algorithm, placement, FULL, session)


@pytest.mark.parametrize(("address", "what"), [("there", "is no address"), ("127.0.0.1:1", "does not answer")])
def test_a_cluster_that_is_not_there_is_an_error_in_words(address: str, what: str) -> None:
    with pytest.raises(ClusterError, match=what) as caught:
        connect(address)
    assert caught.value.remedy


def train(out: Path, checkpoint: Path, address: str, *options: str) -> "subprocess.Popen[bytes]":
    """`vla train` on the cluster that Ray's own variable names, in a process of its own; it writes to `out`.log."""
    words = (
        f"out={out}", f"checkpoint={checkpoint}", "cluster=auto", "env=null", "env.name=point_env:make",
        "env.settings.image_size=16", "env.settings.chunk=2", "slots=8", "decisions=8", "algorithm=ppo",
        "algorithm.minibatches=2", "placement.environment_workers=2", "placement.policy_threads=1",
        "placement.learners=1", *options,
    )  # fmt: skip
    command = [sys.executable, "-c", "import sys; from vla.cli import main; sys.exit(main())", "train"]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, *words], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": address},
        )  # fmt: skip


@pytest.mark.slow
def test_a_node_with_a_network_of_its_own_joins_and_vanishes(checkpoint: Path, run: Path) -> None:
    if why := ray_nodes.why_no_namespace():
        pytest.skip(why)
    here, there = ray_nodes.BRIDGE
    with (
        ray_nodes.namespace() as inside, ray_nodes.head(here) as cluster, ray_nodes.another(cluster, there, inside),
    ):  # fmt: skip
        process = train(run, checkpoint, cluster, "iterations=12", "env.settings.pause_s=0.05")
        try:
            while process.poll() is None and len(rows(run)) < 3:
                time.sleep(0.05)
            ray_nodes.unplug()
            process.wait(200)
        finally:
            process.kill()
            process.wait()
        text = run.with_suffix(".log").read_text()
        assert process.returncode == 0, text
    slots, seconds = ([row[name] for row in rows(run)] for name in ("rollout/slots", "time/elapsed_s"))
    print(f"the iteration in which the node vanished took {np.diff(seconds).max():.1f} s")
    assert f"{here} (here)" in text  # the picture
    assert f"node {there} is lost with environment worker 1, policy worker 1" in text
    assert len(slots) == 12 and slots == sorted(slots, reverse=True)
    assert slots[0] == 8 and slots[-1] == 4
    assert (run / "checkpoint" / "contract.json").exists()


def rows(out: Path) -> list[dict[str, float]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
