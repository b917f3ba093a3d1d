"""The robot presets of configs/robot."""

from deployment.franka import ArmConfig
from vla import configuration


def arm_config(arm_id: str) -> ArmConfig:
    """The preset of an arm, checked."""
    return configuration.load(ArmConfig, arm_id, folder=configuration.config_folder() / "robot")
