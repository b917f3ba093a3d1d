"""`vla serve`: the same actions from afar, and every way in which the connection can fail."""

import threading
import time
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from deployment import wire
from deployment.inference import blank_observation
from deployment.remote import RemoteError, RemotePolicy
from deployment.server import PolicyServer
from vla.errors import SimrealError
from vla.policy import Policy
from vla.types import ActionChunk, Observation


@pytest.fixture
def served(policy: Policy) -> Iterator[PolicyServer]:
    server = PolicyServer(policy)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.close()
    thread.join(5)


def seen(policy: Policy, seed: int = 0) -> Observation:
    blank = blank_observation(policy.contract, 12.5)
    random = np.random.default_rng(seed)
    images = {name: random.integers(0, 256, image.shape, dtype=np.uint8) for name, image in blank.images.items()}
    return Observation(images, blank.state, blank.instruction, blank.stamps)


def test_the_answers_are_those_of_the_policy_itself(policy: Policy, served: PolicyServer) -> None:
    remote = RemotePolicy(f"ws://127.0.0.1:{served.port}")
    assert remote.contract == policy.contract
    asked = [seen(policy, 1), seen(policy, 2)]
    for here, there in zip(policy.act(asked), remote.act(asked), strict=True):
        assert np.array_equal(here.actions, there.actions) and here.stamp == there.stamp == 12.5
    remote.close()


def test_two_clients_are_served_at_once(policy: Policy, served: PolicyServer) -> None:
    clients = [RemotePolicy(f"ws://127.0.0.1:{served.port}") for _ in range(2)]
    for client in clients + clients:
        assert client.act([seen(policy)])[0].actions.shape == (8, 7)
    for client in clients:
        client.close()


def test_a_server_that_ends_is_an_error_and_one_that_returns_is_used_again(policy: Policy) -> None:
    server = PolicyServer(policy)
    port = server.port
    threading.Thread(target=server.run, daemon=True).start()
    remote = RemotePolicy(f"ws://127.0.0.1:{port}")
    server.close()
    with pytest.raises(RemoteError) as caught:
        remote.act([seen(policy)])
    assert caught.value.code == "SERVER_LOST"
    with pytest.raises(RemoteError) as caught:
        remote.act([seen(policy)])
    assert caught.value.code == "SERVER_UNREACHABLE" and "vla serve" in caught.value.remedy
    again = PolicyServer(policy, port=port)
    threading.Thread(target=again.run, daemon=True).start()
    assert remote.act([seen(policy)])[0].actions.shape == (8, 7)
    remote.close()
    again.close()


def test_a_late_answer_is_never_taken_for_the_next_one(policy: Policy, served: PolicyServer) -> None:
    remote = RemotePolicy(f"ws://127.0.0.1:{served.port}", answer_s=0.3)
    act, slow = policy.act, threading.Event()

    def once_slow(observations: list[Observation]) -> list[ActionChunk]:
        if not slow.is_set():
            slow.set()
            time.sleep(0.8)
            return [ActionChunk(np.full((8, 7), 9.0), 0.0)]
        return act(observations)

    policy.act = once_slow
    with pytest.raises(RemoteError) as caught:
        remote.act([seen(policy)])
    assert caught.value.code == "SERVER_LOST"
    time.sleep(0.7)
    assert np.array_equal(remote.act([seen(policy)])[0].actions, act([seen(policy)])[0].actions)
    remote.close()


def test_a_token_is_asked_for(policy: Policy) -> None:
    with pytest.raises(SimrealError, match="token") as refused:
        PolicyServer(policy, host="0.0.0.0")
    assert refused.value.code == "TOKEN_NEEDED"
    server = PolicyServer(policy, token="secret")
    threading.Thread(target=server.run, daemon=True).start()
    for wrong in ("", "guess"):
        with pytest.raises(RemoteError) as caught:
            RemotePolicy(f"ws://127.0.0.1:{server.port}", wrong)
        assert caught.value.code == "SERVER_REFUSES" and "token" in caught.value.remedy
    remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", "secret")
    assert remote.act([seen(policy)])
    remote.close()
    server.close()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\xc1", "WIRE"),
        (msgpack.packb([1, 2]), "WIRE"),
        (msgpack.packb({"observations": [{"images": {}}]}), "WIRE"),
        (msgpack.packb({"observations": [{"images": {"wrist": [1]}, "state": {}, "stamps": {}}]}), "WIRE"),
        (msgpack.packb({"observations": [{"dtype": "object", "shape": [1], "data": b"x"}]}), "WIRE"),
    ],
)
def test_whatever_else_comes_is_answered_with_an_error(served: PolicyServer, message: bytes, code: str) -> None:
    with connect(f"ws://127.0.0.1:{served.port}") as connection:
        connection.recv()
        connection.send(message)
        answer = wire.unpack(connection.recv())
    assert answer["error"]["code"] == code


def test_an_observation_of_another_robot_is_refused(policy: Policy, served: PolicyServer) -> None:
    remote = RemotePolicy(f"ws://127.0.0.1:{served.port}")
    good = seen(policy)
    with pytest.raises(RemoteError) as caught:
        remote.act([Observation({"wrist": good.images["wrist"]}, good.state, good.instruction, good.stamps)])
    assert caught.value.code and "third_person" in str(caught.value)
    assert remote.act([good])  # the connection goes on
    remote.close()
