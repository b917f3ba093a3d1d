"""Training over several hosts: two nodes of a Ray cluster on this machine, and one with a network of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import ray_nodes
import torch
from going_on import GoingOn
from point_env import untrained
from safetensors.torch import load_file

from training.algorithms.base import Algorithm
from training.algorithms.grpo import GRPOConfig
from training.algorithms.ppo import PPOConfig
from training.pipeline import placement as placements
from training.pipeline.actors import ray_session
from training.pipeline.asynchronous import Asynchronous
from training.pipeline.cluster import ClusterError, connect
from training.pipeline.crew import Crew, Node, Place
from training.pipeline.engine import name_of
from training.pipeline.placement import EngineError, PlacementConfig
from training.pipeline.relay import Line
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


@pytest.mark.parametrize(
    "rank",
    [pytest.param(0, marks=pytest.mark.slow, id="all weights"), pytest.param(2, marks=pytest.mark.long, id="adapters")],
)
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    "shard", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)]
)
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


# The asynchronous schedule


def lanes(
    checkpoint: Path, run: Path, nodes: Sequence[Node], staleness: int = 1, slots: int = 8, decisions: int = 12,
    deadline_s: float = 20, algorithm: Algorithm = LEARNS, lora: Lora = FULL, **settings: object,
) -> Asynchronous:  # fmt: skip
    """Two lanes on each of two nodes."""
    placement = PlacementConfig(
        schedule="asynchronous", environment_workers=2, lanes=2, staleness=staleness, policy_threads=1, learners=1,
        deadline_s=deadline_s,
    )  # fmt: skip
    return Asynchronous(
        checkpoint, run, "point_env:make", {**SETTINGS, **settings}, "in_distribution", slots, decisions, algorithm,
        placement, 3, 1000, lora, nodes,
    )  # fmt: skip


def played(made: Asynchronous) -> dict[int, int]:
    """Decisions so far of the policy worker of each node."""
    return {i: int(made.board["decided"][i]) for i in made.policies}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lanes_on_two_hosts_learn(session: list[Node], checkpoint: Path, tmp_path: Path) -> None:
    untrained(tmp_path / "random")
    made = lanes(tmp_path / "random", tmp_path / "run", session, slots=32)
    try:
        assert isinstance(made.watches[1], Line) and made.crew.policies == (Place(0), Place(1))
        success: list[float] = []
        elsewhere: list[int] = []
        while len(success) < 60 and (len(success) < 4 or np.mean(success[-3:]) < 0.9):
            elsewhere.append(played(made)[1])
            rollout, update = made.iterate(len(success))
            success.append(float(np.mean([s for log in rollout.episodes for s in log.successes])))
            assert update.metrics["staleness_max"] <= 1 and rollout.measures["rollout/slots"] == 32
        assert (made.counters() > 0).all()
        print(f"success {success[0]:.2f} at first, {np.mean(success[-3:]):.2f} after {len(success)} updates")
        assert np.mean(success[-3:]) >= 0.9 > 0.75 > success[0]
        share = played(made)[1] / sum(played(made).values())
        print(f"{share:.0%} of the decisions were made on the other node")
        # Within one iteration it may stand still: one ahead, it waits for weights. Within three it may not.
        assert share > 0.2 and played(made)[1] > elsewhere[-3]
        use = made.use()
        assert 0 < use["use/environments"] <= 1 and 0 < use["use/policy"] <= 1
    finally:
        made.close()
    assert not list(Path("/dev/shm").glob(f"{made.name}*"))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_without_staleness_lanes_of_another_host_wait_for_the_newest_weights(
    session: list[Node], checkpoint: Path, tmp_path: Path, rank: int
) -> None:
    """A fragment there is granted after their arrival: what was decided with older ones would be dropped."""
    lora = Lora(rank=rank) if rank else FULL
    made = lanes(checkpoint, tmp_path / "run", session, staleness=0, lora=lora)
    try:
        for iteration in range(6):
            rollout, update = made.iterate(iteration)
            assert update.metrics["staleness_max"] == update.metrics["staleness_mean"] == 0
            assert rollout.measures["rollout/dropped_fragments"] == 0
        assert min(played(made).values()) >= 5 * 2 * 2 * 12
        (tmp_path / "state").mkdir()
        made.save(tmp_path / "state")
        counters = made.counters()
    finally:
        made.close()
    made = lanes(checkpoint, tmp_path / "run", session, staleness=0, lora=lora)
    try:
        made.restore(tmp_path / "state", 6, counters.tolist())
        for iteration in (6, 7):
            assert made.iterate(iteration)[1].metrics["staleness_max"] == 0
        assert (made.counters() >= counters).all() and (made.counters() > counters).any()
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_episodes_in_groups_are_played_on_two_hosts(
    session: list[Node], checkpoint: Path, tmp_path: Path
) -> None:
    algorithm = GRPOConfig(groups=4, group_size=2, minibatches=2, filter_groups=False)
    made = lanes(checkpoint, tmp_path / "run", session, decisions=6, algorithm=algorithm)
    try:
        for iteration in range(5):
            rollout, update = made.iterate(iteration)
            assert rollout.measures["rollout/groups"] >= 4 and np.isfinite(update.metrics["loss"])
            assert update.metrics["staleness_max"] <= 1
        assert min(played(made).values()) > 0
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_when_a_node_is_lost_the_lanes_of_the_others_fill_the_updates(
    cluster: str, session: list[Node], checkpoint: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {node.id for node in session}
    with ray_nodes.another(cluster) as third:
        nodes = [session[0], *(node for node in current() if node.id not in known)]
        made = lanes(checkpoint, run, nodes, pause_s=0.02)
        try:
            for iteration in range(2):
                assert made.iterate(iteration)[0].measures["rollout/slots"] == 8
            assert min(played(made).values()) > 0
            killer = threading.Timer(0.4, third.kill)
            killer.start()
            slots = []
            while len(slots) < 3 or slots[-3] != 4:
                iteration += 1
                assert iteration < 200
                rollout, update = made.iterate(iteration)
                slots.append(rollout.measures["rollout/slots"])
                assert np.isfinite(update.metrics["loss"]) and update.metrics["staleness_max"] <= 1
            killer.join()
            said = capfd.readouterr().out
            what = "is lost with environment worker 1, policy worker 1: the run goes on with 4 of 8 environments"
            assert said.count(what) == 1
            assert made.processes.keys() == {"environment worker 0", "policy worker 0", "learner 0"}
            assert sorted(slots, reverse=True) == slots and not set(made.dispatcher.playing.values()) & {2, 3}
            before = made.counters()
            made.iterate(iteration + 1)
            made.iterate(iteration + 2)
            after = made.counters()
            assert (after[:4] > before[:4]).all() and (after[4:] == before[4:]).all()
        finally:
            made.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_workers_of_another_host_that_fail_are_replaced_there(
    session: list[Node], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = lanes(checkpoint, tmp_path / "run", session, deadline_s=8, pause_s=0.01)
    run = GoingOn(made, 300, staleness=1, slots=8)
    try:
        run.times(2)
        for name, how, why in (
            ("environment worker 1", signal.SIGKILL, "its process died"),
            ("policy worker 1", signal.SIGKILL, "its process died"),
            ("policy worker 1", signal.SIGSTOP, "it has not decided for 8 s"),
        ):
            capfd.readouterr()
            before = dict(made.processes)
            os.kill(before[name], how)
            run.until(lambda before=before: made.processes != before)
            assert {k for k in before if before[k] != made.processes[k]} == {name}
            assert f"{name} (process {before[name]}) is restarted: {why}" in capfd.readouterr().out
            assert not psutil.pid_exists(before[name])
            goal, begun = played(made)[1] + 20, made.counters() + 1
            run.until(lambda goal=goal, begun=begun: played(made)[1] > goal and (made.counters() >= begun).all())
    finally:
        made.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_that_answers_slowly_is_not_lost_and_one_that_is_silent_is(
    session: list[Node], checkpoint: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = lanes(checkpoint, run, session, deadline_s=12)
    try:
        made.iterate(0)
        line = made.watches[1]
        assert isinstance(line, Line)
        process = psutil.Process(ray.get(line.relay.ready.remote()))
        process.suspend()
        resume = threading.Timer(5, process.resume)
        resume.start()
        iteration, began = 1, time.monotonic()
        while resume.is_alive() or time.monotonic() - began < 8:
            made.iterate(iteration)
            iteration += 1
        before = played(made)[1]
        while played(made)[1] <= before:
            assert made.iterate(iteration)[0].measures["rollout/slots"] == 8
            iteration += 1
        assert "lost" not in capfd.readouterr().out
        process.suspend()
        began = time.monotonic()
        while made.iterate(iteration)[0].measures["rollout/slots"] == 8:
            iteration += 1
        seconds = time.monotonic() - began
        print(f"lost after {seconds:.1f} s of silence")
        assert "it has not answered for 12 s" in capfd.readouterr().out and seconds > 10
        process.kill()
    finally:
        made.close()


@pytest.mark.parametrize(("address", "what"), [("there", "is no address"), ("127.0.0.1:1", "does not answer")])
def test_a_cluster_that_is_not_there_is_an_error_in_words(address: str, what: str) -> None:
    with pytest.raises(ClusterError, match=what) as caught:
        connect(address)
    assert caught.value.remedy


ITERATIONS = {"synchronous": 12, "asynchronous": 80}  # here lanes go on while nobody knows that a node has vanished


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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "schedule",
    [pytest.param("synchronous", marks=pytest.mark.slow), pytest.param("asynchronous", marks=pytest.mark.long)],
)
def test_a_node_with_a_network_of_its_own_joins_and_vanishes(checkpoint: Path, run: Path, schedule: str) -> None:
    if why := ray_nodes.why_no_namespace():
        pytest.skip(why)
    here, there = ray_nodes.BRIDGE
    with (
        ray_nodes.namespace() as inside, ray_nodes.head(here) as cluster, ray_nodes.another(cluster, there, inside),
    ):  # fmt: skip
        process = train(
            run, checkpoint, cluster, f"iterations={ITERATIONS[schedule]}", "env.settings.pause_s=0.05",
            f"placement.schedule={schedule}", "placement.deadline_s=20",
        )  # fmt: skip
        try:
            while process.poll() is None and len(rows(run)) < 3:
                time.sleep(0.05)
            ray_nodes.unplug()
            process.wait(600)
        finally:
            process.kill()
            process.wait()
        text = run.with_suffix(".log").read_text()
        assert process.returncode == 0, text
    slots, seconds = ([row[name] for row in rows(run)] for name in ("rollout/slots", "time/elapsed_s"))
    print(f"the iteration in which the node vanished took {np.diff(seconds).max():.1f} s")
    assert f"{here} (here)" in text  # the picture
    assert f"node {there} is lost with environment worker 1, policy worker 1" in text
    assert len(slots) == ITERATIONS[schedule] and slots == sorted(slots, reverse=True)
    assert slots[0] == 8 and slots[-1] == 4
    assert (run / "checkpoint" / "contract.json").exists()


def rows(out: Path) -> list[dict[str, float]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
