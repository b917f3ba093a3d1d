"""The arms that play put-on-plate in ManiSkill: its Panda, and RL4VLA's WidowX where its model is installed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sapien
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseControllerConfig
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.agents.robots.widowx.widowx import WidowX250S
from mani_skill.utils.structs.link import Link
from mani_skill.utils.structs.types import SimConfig
from scipy.spatial.transform import Rotation

from vla.errors import SimrealError
from vla.tasks.put_on_plate import RATE_HZ, TaskSet
from vla.tasks.put_on_plate_25 import SCANS, Grid


@dataclass(frozen=True)
class Robot:
    """What the task has to know of an arm.

    tasks: where things stand for it; rest: joints that keep it away from them, fingers included; arm: its joints;
    down: the tool when it points down, its y axis along which the fingers close; lowest: the tool at a grasp, m;
    rates: of physics and control. wrist: ManiSkill's name of the camera at the wrist, None where there is none.
    """

    tasks: TaskSet
    rest: np.ndarray
    arm: int
    down: Rotation
    lowest: float
    rates: SimConfig
    wrist: str | None = None


def _around(tasks: TaskSet, center: tuple[float, float], start: tuple[float, float, float]) -> TaskSet:
    """The same things around another place."""
    assert isinstance(tasks.layout, Grid)
    return replace(tasks, layout=replace(tasks.layout, center=center), start_position=start)


PANDA = Robot(
    tasks=SCANS,
    rest=Panda.keyframes["rest"].qpos,
    arm=7,
    down=Rotation.from_matrix(np.diag([1.0, -1.0, -1.0])),
    lowest=0.012,
    rates=SimConfig(sim_freq=200, control_freq=round(RATE_HZ)),
)
# As published: 5 Hz, joints at the start, things 0.3 m before the base.
WIDOWX = Robot(
    tasks=_around(SCANS, (0.307, 0.028), (0.25, 0.0, 0.16)),
    rest=np.array([-0.018, 0.040, 0.222, -0.005, 1.365, 0.002, 0.037, 0.037]),
    arm=6,
    down=Rotation.from_euler("y", math.pi / 2),
    lowest=0.012,
    rates=SimConfig(sim_freq=500, control_freq=5),
)


@register_agent()
class PublishedWidowX(WidowX250S):
    """RL4VLA's WidowX, its gains, with ManiSkill's bounds of an action of the Panda, 0.1 m and 0.1 rad."""

    uid = "widowx250s_put_on_plate"

    @property
    def _controller_configs(self) -> dict[str, dict[str, object]]:
        arm = PDEEPoseControllerConfig(
            joint_names=self.arm_joint_names, pos_lower=-0.1, pos_upper=0.1, rot_lower=-0.1, rot_upper=0.1,
            stiffness=[1169.79, 730.0, 808.46, 1229.13, 1272.28, 1056.33],
            damping=[330.0, 180.0, 152.12, 309.62, 201.05, 269.51], force_limit=[200, 200, 100, 100, 100, 100],
            ee_link="ee_gripper_link", urdf_path=self.urdf_path, use_target=True,
        )  # fmt: skip
        gripper = PDJointPosMimicControllerConfig(
            self.gripper_joint_names, lower=0.014, upper=0.038, stiffness=1000, damping=200, force_limit=60,
            mimic={"right_finger": {"joint": "left_finger"}},
        )  # fmt: skip
        return {"pd_ee_target_delta_pose": {"arm": arm, "gripper": gripper}}

    def _after_init(self) -> None:
        self.tcp = self.robot.links_map["ee_gripper_link"]


ROBOTS: Mapping[str, Robot] = {
    "panda": PANDA, "panda_wristcam": replace(PANDA, wrist="hand_camera"), PublishedWidowX.uid: WIDOWX,
}  # fmt: skip


def look_as_its_box(link: Link) -> None:
    """A link's collision box in place of its mesh. The camera's has 425,160 triangles, three times as many as the arm,
    which take two thirds of the time of an image on the processor."""
    entity, collision = link._objs[0].entity, link._objs[0].collision_shapes[0]
    shape = sapien.render.RenderShapeBox(
        collision.half_size, sapien.render.RenderMaterial(base_color=[0.7] * 3 + [1.0])
    )
    shape.local_pose = collision.local_pose
    entity.remove_component(entity.find_component_by_type(sapien.render.RenderBodyComponent))
    body = sapien.render.RenderBodyComponent()
    body.attach(shape)
    entity.add_component(body)


def check_model(uid: str) -> None:
    """Refuse a WidowX whose model is not installed; the Panda's comes with ManiSkill."""
    if uid == PublishedWidowX.uid and not Path(PublishedWidowX.urdf_path).exists():
        raise SimrealError(
            f"the WidowX's model is not at {PublishedWidowX.urdf_path}", code="ASSETS_MISSING",
            remedy="python -m mani_skill.utils.download_asset widowx250s",
        )  # fmt: skip
