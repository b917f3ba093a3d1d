"""A checkpoint on a Franka arm, or on its twin:

ros2 launch vla_policy franka.launch.py checkpoint:=runs/quickstart/checkpoint robot_ip:=172.16.0.2
ros2 launch vla_policy franka.launch.py checkpoint:=runs/quickstart/checkpoint use_sim:=true
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from vla_policy import graph


def make_nodes(context: LaunchContext) -> list:
    given = {name: LaunchConfiguration(name).perform(context) for name in graph.ARGUMENTS}
    actions = []
    for spec in graph.nodes(given):
        node = Node(
            package="vla_policy",
            executable=spec.executable,
            name=spec.executable,
            namespace=given["namespace"],
            output="screen",
            parameters=[{name: value for name, value in spec.parameters.items() if value != ""}],
        )
        reason = f"{spec.executable} has ended"
        over = RegisterEventHandler(
            OnProcessExit(target_action=node, on_exit=[EmitEvent(event=Shutdown(reason=reason))])
        )
        actions += [node, over]
    return actions


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in graph.ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=make_nodes)])
