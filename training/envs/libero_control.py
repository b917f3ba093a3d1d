"""robosuite's control of the arm, equal to the last bit, without what it looks up and works out again each time."""

from typing import Any

import mujoco
import numpy as np


class Control:
    """Of one episode: robosuite makes a new controller with each.

    The simulation has to be stepped as far as its bias forces; robosuite would compute it again in each substep.
    """

    def __init__(self, env: Any):
        (robot,) = env.robots
        self.robot, self.controller = robot, robot.controller
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.site = self.model.site(self.controller.eef_name).id
        self.joints, self.speeds = self.controller.qpos_index, self.controller.qvel_index
        self.arm = robot._ref_joint_actuator_indexes
        self.fingers = [self.model.actuator(name).id for name in robot.gripper.actuators]
        self.torques = self.model.actuator_ctrlrange[self.arm].T
        low, high = self.model.actuator_ctrlrange[self.fingers].T
        self.middle, self.half = 0.5 * (high + low), 0.5 * (high - low)
        self.mass = np.zeros((self.model.nv, self.model.nv))
        self.controller.update = self._update

    def apply(self, action: np.ndarray, is_new: bool) -> None:
        """Set the actuators for a substep; is_new: whether the action `[7]` is, whose goal is then taken."""
        arm, gripper = action[: self.controller.control_dim], action[self.controller.control_dim :]
        if is_new:
            self.controller.set_goal(arm)
        self.data.ctrl[self.arm] = np.clip(self.controller.run_controller(), *self.torques)
        self.data.ctrl[self.fingers] = self.middle + self.half * self.robot.gripper.format_action(gripper)

    def _update(self, force: bool = False) -> None:
        """In place of the controller's own: its Jacobians once instead of twice, and no names."""
        controller, data = self.controller, self.data
        if not (controller.new_update or force):
            return
        moved, turned = np.zeros((2, 3, self.model.nv))
        mujoco.mj_jacSite(self.model, data, moved, turned, self.site)
        controller.ee_pos = data.site_xpos[self.site].copy()
        controller.ee_ori_mat = data.site_xmat[self.site].reshape(3, 3).copy()
        controller.ee_pos_vel, controller.ee_ori_vel = np.dot(moved, data.qvel), np.dot(turned, data.qvel)
        controller.joint_pos, controller.joint_vel = data.qpos[self.joints], data.qvel[self.speeds]
        controller.J_pos, controller.J_ori = moved[:, self.speeds], turned[:, self.speeds]
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        mujoco.mj_fullM(self.model, self.mass, data.qM)
        controller.mass_matrix = self.mass[self.speeds, :][:, self.speeds]
        controller.new_update = False
