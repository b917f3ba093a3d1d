#!/bin/bash
set -e
. /opt/ros/jazzy/setup.bash
. /opt/ros2_ws/local_setup.bash
exec "$@"
