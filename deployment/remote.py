"""A policy on another machine, behind `vla serve`."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from deployment import wire
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.types import ActionChunk, Observation

CONNECT_S = 5.0


class RemoteError(SimrealError):
    """The server can't be reached, refuses, or has gone."""


class RemotePolicy:
    """Answers observations like a Policy. A lost connection is an error of that call; the next one connects anew.

    url: ws://HOST:PORT. token: what the server asks for; "" for none. answer_s: longest wait for an answer.
    """

    def __init__(self, url: str, token: str = "", answer_s: float = 2.0):
        self.url, self.answer_s = url, answer_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._open = ExitStack()
        self._connection: ClientConnection | None = None
        self.contract = self._connect()

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """An action chunk for each observation. Raises RemoteError."""
        if self._connection is None and self._connect() != self.contract:
            self.close()
            raise RemoteError(
                f"{self.url} serves another policy now", code="SERVER_CHANGED", remedy="Start policy_node again."
            )
        answer = self._exchange({"observations": [wire.observation_data(seen) for seen in observations]})
        if "error" in answer:
            error = answer["error"]
            raise RemoteError(str(error["message"]), code=str(error["code"]), remedy=str(error["remedy"]))
        chunks = [wire.chunk_from(chunk) for chunk in answer.get("chunks", ())]
        if len(chunks) != len(observations):
            raise RemoteError(f"{len(chunks)} chunks for {len(observations)} observations", code="WIRE")
        return chunks

    def close(self) -> None:
        self._connection = None
        self._open.close()

    def _connect(self) -> PolicyContract:
        try:
            opened = connect(
                self.url, additional_headers=self._headers, open_timeout=CONNECT_S, max_size=wire.MAX_BYTES,
                compression=None,
            )  # fmt: skip
            self._connection = self._open.enter_context(opened)
            greeting = wire.unpack(self._connection.recv(CONNECT_S))
        except InvalidHandshake as error:
            raise RemoteError(
                f"{self.url} refuses: {error}",
                code="SERVER_REFUSES",
                remedy="Pass the token that it was started with.",
            ) from error
        except (OSError, InvalidURI, ConnectionClosed) as error:
            raise RemoteError(
                f"no policy at {self.url}: {error}", code="SERVER_UNREACHABLE",
                remedy="Start `vla serve checkpoint=...` there, with an address that this machine can reach.",
            ) from error  # fmt: skip
        if greeting.get("protocol") != wire.PROTOCOL:
            raise RemoteError(
                f"{self.url} speaks protocol {greeting.get('protocol')}, not {wire.PROTOCOL}", code="WIRE",
                remedy="Install the same release of simreal on both machines.",
            )  # fmt: skip
        return PolicyContract.from_json(str(greeting["contract"]))

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._connection is not None
        try:
            self._connection.send(wire.pack(message))
            return wire.unpack(self._connection.recv(self.answer_s))
        except (OSError, ConnectionClosed) as error:  # a late answer must not be taken for the next one's
            self.close()
            raise RemoteError(
                f"the connection to {self.url} is lost: {error or type(error).__name__}", code="SERVER_LOST",
                remedy="Check the network and `vla serve`; then reset_fault and start.",
            ) from error  # fmt: skip
