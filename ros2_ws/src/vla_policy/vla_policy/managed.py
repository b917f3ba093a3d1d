"""What the lifecycle nodes have in common: they tell why they fail, start by themselves, and report their health."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from vla.errors import Fault, SimrealError
from vla_policy import messages
from vla_policy.parameters import Parameter, declare, read


class ManagedNode(LifecycleNode, ABC):
    """A lifecycle node with these parameters, of which `autostart` is one.

    failed: why the node can't go on; its process ends with that.
    """

    def __init__(self, name: str, parameters: Sequence[Parameter]):
        super().__init__(name)
        declare(self, parameters)
        self.failed = ""
        self._made: list[tuple[str, Any]] = []  # (kind, what there is while the node is active)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._diagnose)
        if read(self, "autostart"):
            self._once = self.create_timer(0.05, self._autostart)

    @abstractmethod
    def configure(self) -> None:
        """Make everything ready. Raises SimrealError."""

    @abstractmethod
    def health(self) -> tuple[str, Fault | None, dict[str, object]]:
        """Who reports, what is wrong, and values to tell."""

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self.configure()
        except SimrealError as error:
            self.failed = str(error)
            self.get_logger().error(self.failed)
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def _destroy_made(self) -> None:
        for kind, made in self._made:
            getattr(self, f"destroy_{kind}")(made)
        self._made = []

    def _autostart(self) -> None:
        self.destroy_timer(self._once)
        success = TransitionCallbackReturn.SUCCESS
        if self.trigger_configure() != success or self.trigger_activate() != success:
            self.failed = self.failed or "it could not be activated, see above"

    def _diagnose(self) -> None:
        source, fault, values = self.health()
        values = {"state": self._state_machine.current_state[1], **values}
        status = messages.status_message(str(self.get_fully_qualified_name()), source, fault, values)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)
