"""What the nodes' processes have in common: they start, spin, and end in order with a plain message."""

import os
import signal
import sys
from collections.abc import Callable
from threading import Event
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from std_srvs.srv import Trigger

from vla.errors import SimrealError

STARTER = "VLA_STARTED_BY"  # the process without which a node has nothing to do; absent with ros2 launch
REALTIME = 1  # priority, of 1 to 99: before all that is not realtime, behind libfranka's own thread
NICE = 10


def go_first() -> None:
    """Let the threads that are made from now on run before other processes; says so if this user may not."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME))
    except PermissionError:
        told = "no realtime priority, other programs may delay commands; allow your user rtprio in limits.conf"
        print(told, file=sys.stderr, flush=True)


def stand_back() -> None:
    """Let other processes run before the threads that are made from now on."""
    os.nice(NICE)


def starter() -> dict[str, str]:
    """Environment for nodes that are to end, in order, when this process does, however that ends."""
    return {STARTER: str(os.getpid())}


def _orphaned() -> bool:
    return STARTER in os.environ and os.getppid() != int(os.environ[STARTER])


def run(make: Callable[[], Any], arguments: list[str]) -> int:
    """Spin a node until SIGINT or SIGTERM, or until its starter is gone, then call its `close`.

    Returns the exit code, 2 after an expected error.
    """
    rclpy.init(args=arguments, signal_handler_options=rclpy.SignalHandlerOptions.NO)
    over = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    node = None
    try:
        node = make()
        executor = EventsExecutor()  # a fraction of the other executors' cost
        executor.add_node(node)
        while not over.is_set() and rclpy.ok() and not getattr(node, "failed", ""):
            executor.spin_once(timeout_sec=0.1)
            if _orphaned():
                print(f"{node.get_name()}: the process that started it is gone", file=sys.stderr, flush=True)
                return 2
        if getattr(node, "failed", ""):
            print(f"{node.get_name()}: {node.failed}", file=sys.stderr, flush=True)
            return 2
        return 0
    except (SimrealError, ValueError) as error:
        print(f"{node.get_name() if node else 'node'}: {error}", file=sys.stderr, flush=True)
        return 2
    except ExternalShutdownException:
        return 0
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()


def offer(node: Node, name: str, request: Callable[[], str]) -> None:
    """A Trigger service; a SimrealError becomes a refusal in words."""

    def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            response.success, response.message = True, request()
        except SimrealError as error:
            response.success, response.message = False, str(error)
        return response

    node.create_service(Trigger, f"~/{name}", answer)
