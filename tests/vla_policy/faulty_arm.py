"""An arm that stops with a fault in every trial, behind the services and topics of franka_node and twin_node."""

import contextlib
import threading

import rclpy
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_policy import messages

ACTS_S = 0.1


class FaultyArm(Node):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("arm")
        self._status = self.create_publisher(String, "franka_node/status", messages.LATCHED)
        self._now = "idle"
        answers = {
            "franka_node/start": self._start, "franka_node/stop": lambda: (True, "stopped"),
            "franka_node/home": lambda: self._become("idle"), "franka_node/reset_fault": lambda: self._become("idle"),
            "twin_node/lay_out": lambda: (True, "put the red cube on the plate"),
            "twin_node/judge": lambda: (True, '{"success": false, "where": "reach", "distance_m": 0.2}'),
        }  # fmt: skip
        for name, answer in answers.items():
            self.create_service(Trigger, name, lambda _, response, answer=answer: self._say(response, *answer()))
        self.create_service(SetParameters, "twin_node/set_parameters", self._set)
        self._become("idle")

    def _start(self) -> tuple[bool, str]:
        if self._now == "fault":
            return False, "a fault is latched: CAMERA_SILENT at wrist"
        threading.Timer(ACTS_S, self._become, ("fault",)).start()
        return self._become("running")

    def _become(self, status: str) -> tuple[bool, str]:
        self._now = status
        self._status.publish(String(data=status))
        return True, status

    def _say(self, response: Trigger.Response, success: bool, text: str) -> Trigger.Response:
        response.success, response.message = success, text
        return response

    def _set(self, request: SetParameters.Request, response: SetParameters.Response) -> SetParameters.Response:
        response.results = [SetParametersResult(successful=True) for _ in request.parameters]
        return response


if __name__ == "__main__":
    rclpy.init()
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(FaultyArm())
