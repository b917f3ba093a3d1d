"""The whole deployment on the twin: nodes in processes of their own, franky, franky-sim, cameras, a real policy."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from vla_policy.conductor import Conductor
from vla_policy.deploy import DeployConfig, Graph, running
from vla_policy.start import NODES

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def own_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from whatever else runs on this machine."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))


@pytest.fixture
def deployed(tmp_path: Path, bundle: Path) -> Iterator[tuple[Graph, Conductor]]:
    """The graph at home, in a namespace, ready to start."""
    config = DeployConfig(
        checkpoint=bundle, use_sim=True, namespace="left", trials=1, out=tmp_path / "x.json", logs=tmp_path
    )
    with running(config) as made, Conductor("left", lambda: "") as conductor:
        conductor.wait_until_ready()
        yield made, conductor


def test_a_policy_that_hangs_dies_or_comes_twice_and_ctrl_c(
    deployed: tuple[Graph, Conductor], until: Callable[..., bool]
) -> None:
    made, conductor = deployed
    policy = made.processes["policy_node"]
    assert conductor.trigger("franka_node/start") == (True, "the policy acts")
    assert until(lambda: conductor.status == "running", 2.0), conductor.status
    time.sleep(1.0)
    policy.send_signal(signal.SIGSTOP)
    assert until(lambda: conductor.status == "holding", 1.5), conductor.status
    policy.send_signal(signal.SIGCONT)
    assert until(lambda: conductor.status == "running", 2.0), conductor.status
    time.sleep(0.5)
    policy.kill()
    assert until(lambda: conductor.status == "holding", 1.5), conductor.status
    assert until(lambda: conductor.status == "fault", 3.0), conductor.status
    refused, text = conductor.trigger("franka_node/start")
    assert not refused and "POLICY_SILENT" in text
    assert conductor.trigger("franka_node/reset_fault")[0] and until(lambda: conductor.status == "idle", 2.0)
    refused, text = conductor.trigger("franka_node/start")
    assert not refused and "NO_POLICY" in text
    for process in made.processes.values():
        process.send_signal(signal.SIGINT)
    assert [process.wait(10) for process in made.processes.values() if process is not policy] == [0, 0]


def test_nodes_have_priorities_and_end_with_the_process_that_started_them(
    tmp_path: Path, bundle: Path, until: Callable[..., bool]
) -> None:
    words = ["deploy", "use_sim=true", f"checkpoint={bundle}", f"logs={tmp_path}", "namespace=left"]
    words.append(f"record={tmp_path / 'episodes'}")
    deploy = subprocess.Popen([sys.executable, "-m", "vla", *words], stdout=subprocess.DEVNULL)
    ask = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    may = not subprocess.run([sys.executable, "-c", ask], stderr=subprocess.DEVNULL).returncode
    try:
        with Conductor("left", lambda: "") as conductor:
            conductor.wait_until_ready()
            nodes = psutil.Process(deploy.pid).children(recursive=True)
            assert len(nodes) >= 4 and conductor.trigger("franka_node/start")[0]
            of = {name: node for node in nodes for name in NODES if name in node.cmdline()}
            own, driver = os.getpriority(os.PRIO_PROCESS, 0), of["franka_node"].pid
            assert os.sched_getscheduler(driver) == (os.SCHED_RR if may else os.SCHED_OTHER)
            assert os.sched_getscheduler(of["policy_node"].pid) == os.SCHED_OTHER
            assert of["policy_node"].nice() == of["twin_node"].nice() == own
            assert until(lambda: of["recorder_node"].nice() == min(own + 10, 19), 10.0)  # nobody waits for it to start
            deploy.kill()
            deploy.wait()
            assert not psutil.wait_procs(nodes, timeout=15)[1]
    finally:
        deploy.kill()  # its nodes end with it


def test_a_policy_on_another_machine_acts_dry_and_its_loss_is_a_fault(
    tmp_path: Path, bundle: Path, until: Callable[..., bool]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = subprocess.Popen([sys.executable, "-m", "vla", "serve", f"checkpoint={bundle}", f"port={port}"])
    config = DeployConfig(
        server=f"ws://127.0.0.1:{port}", contract=bundle / "contract.json", use_sim=True, dry_run=True, trials=1,
        out=tmp_path / "x.json", logs=tmp_path,
    )  # fmt: skip
    try:
        assert until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 60.0)
        with running(config) as made, Conductor("", made.ended) as conductor:
            conductor.wait_until_ready()
            started, text = conductor.trigger("franka_node/start")
            assert started and "the arm is not moved" in text
            assert until(lambda: conductor.status == "running", 2.0), conductor.status
            with conductor.tracing() as trace:
                assert until(lambda: len(trace) > 50 and abs(trace[-1][1] - trace[0][1]).max() > 1e-4, 5.0)
            serve.kill()
            assert until(lambda: conductor.status == "fault", 5.0)
            assert "SERVER_" in conductor.trigger("franka_node/start")[1]
    finally:
        serve.kill()
        serve.wait()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cameras": ["third_person"]}, "CAMERA_MISSING"),
        ({"checkpoint": Path("/nowhere")}, "/nowhere"),
        ({"use_sim": False, "robot_ip": "127.77.0.1"}, "ROBOT_UNREACHABLE"),
    ],
)
def test_what_can_not_work_ends_with_a_plain_message(tmp_path: Path, bundle: Path, change: dict, told: str) -> None:
    given = {"checkpoint": bundle, "use_sim": True, "logs": tmp_path, **change}
    words = [f"{k}={str(v).replace(' ', '')}" for k, v in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", "vla", "deploy", *words], capture_output=True, text=True, timeout=120, check=False
    )
    logs = "\n".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert done.returncode == 2 and "NODE_ENDED" in done.stderr
    assert told in logs and "Traceback" not in logs
