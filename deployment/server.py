"""`vla serve`: a checkpoint behind a WebSocket, for a robot whose computer has no GPU."""

import hmac
import ipaddress
import os
import signal
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from deployment import wire
from deployment.inference import WARM_UP, blank_observation, failed
from vla.cli import Command
from vla.errors import SimrealError
from vla.policy import Policy, Speedup


@dataclass(frozen=True)
class ServeConfig:
    """Options of `vla serve`.

    checkpoint: bundle to serve.
    host: address to listen on; other than loopback needs a token.
    port: TCP port.
    token: what clients have to show; by default the environment variable SIMREAL_TOKEN.
    device: of torch, such as cpu or cuda.
    threads: of torch.
    speedup: for calls with one observation: graph (fixed shapes, CUDA graphs on a GPU), compile (torch.compile as well,
        which takes long at the start), or none.
    """

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = wire.PORT
    token: str = ""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1
    speedup: Speedup = "none"


class PolicyServer:
    """Serves one policy to any number of clients, one call at a time."""

    def __init__(self, policy: Policy, host: str = "127.0.0.1", port: int = 0, token: str = ""):
        if not token and not _is_loopback(host):
            raise SimrealError(
                f"whoever reaches {host} could use the policy", code="TOKEN_NEEDED",
                remedy="Pass token=..., or set SIMREAL_TOKEN, or listen on 127.0.0.1.",
            )  # fmt: skip
        self.policy, self._token, self._turn = policy, token, threading.Lock()
        try:
            self._server: Server = serve(
                self._talk, host, port, process_request=self._admit, max_size=wire.MAX_BYTES, compression=None
            )
        except OSError as error:
            raise SimrealError(
                f"can't listen on {host}:{port}: {error}", code="PORT", remedy="Choose another port or address."
            ) from error
        self.port = int(self._server.socket.getsockname()[1])

    def run(self) -> None:
        """Serve until `close`."""
        self._server.serve_forever()

    def close(self) -> None:
        self._server.shutdown()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        shown = request.headers.get("Authorization", "")
        if not self._token or hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "a token is needed\n")

    def _talk(self, connection: ServerConnection) -> None:
        connection.send(wire.pack({"protocol": wire.PROTOCOL, "contract": self.policy.contract.to_json()}))
        try:
            for message in connection:
                connection.send(wire.pack(self._answer(message)))
        except ConnectionClosed:
            return

    def _answer(self, message: bytes | str) -> dict[str, Any]:
        try:
            data = wire.unpack(message)
            seen = [wire.observation_from(part) for part in data.get("observations", ())]
            with self._turn:
                chunks = self.policy.act(seen)
            return {"chunks": [wire.chunk_data(chunk) for chunk in chunks]}
        except Exception as error:  # the client is told what went wrong, and the others are served on
            fault = failed(error)
            return {"error": {"code": fault.code, "message": str(fault), "remedy": fault.remedy}}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(config: ServeConfig) -> None:
    """Load, warm up, serve."""
    torch.set_num_threads(config.threads)
    policy = Policy.load(config.checkpoint, None, "vla serve", device=config.device).speed_up(config.speedup)
    blank = blank_observation(policy.contract, 0.0)
    for _ in range(WARM_UP):
        policy.act([blank])
    server = PolicyServer(policy, config.host, config.port, config.token or os.environ.get("SIMREAL_TOKEN", ""))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.close).start())
    print(f"serving {config.checkpoint} at ws://{config.host}:{server.port}", flush=True)
    server.run()


command = Command(name="serve", help="Serve a checkpoint to a robot over the network.", schema=ServeConfig, run=run)
