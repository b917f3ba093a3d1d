"""The policy and its contract: what is identical in simulation and on the robot."""
