"""ROS 2 nodes around `deployment`: policy_node, franka_node, twin_node, recorder_node, and the graph that they make."""
