"""The tabletop's scene as MJCF: the FR3 of the `franky-sim` package, table, light and cameras."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from vla.adapters import tabletop as adapter

TIMESTEP = 0.002  # s
TOOL_OFFSET = 0.1034  # m from the hand frame to the tool centre
TABLE_TEXTURE = 64  # px
TABLES = 21


def table_texture(look: int) -> np.ndarray:
    """A table top `[64, 64, 3]` uint8: a base colour with a pattern, fixed by its number."""
    rng = np.random.default_rng([look, 4242])
    base = rng.uniform(0.25, 0.85) * np.array([1.0, 1.0, 1.0]) + rng.uniform(-0.10, 0.10, 3)
    other = np.clip(base + rng.uniform(-0.14, 0.14, 3), 0, 1)
    y, x = np.mgrid[0:TABLE_TEXTURE, 0:TABLE_TEXTURE] / TABLE_TEXTURE
    angle, frequency = rng.uniform(0, np.pi), rng.integers(2, 7)
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    kind = look % 4
    if kind == 1:
        wave = np.sign(wave)
    elif kind == 2:
        wave = np.sign(np.sin(2 * np.pi * frequency * x) * np.sin(2 * np.pi * frequency * y))
    elif kind == 3:
        wave = wave + 0.7 * rng.standard_normal(wave.shape)
    blend = np.clip(0.5 + 0.5 * wave, 0, 1)[..., None]
    return (255 * np.clip(base * blend + other * (1 - blend), 0, 1)).astype(np.uint8)


def _fr3_asset() -> Path:
    import franky_sim

    return Path(franky_sim.__file__).parent / "assets" / "fr3.xml"


def robot_scene() -> ElementTree.Element:
    """The FR3 with its collision meshes drawn, its pads as the only colliding parts, tool and two cameras."""
    path = _fr3_asset()
    root = ElementTree.parse(path).getroot()
    compiler = root.find("compiler")
    assert compiler is not None
    compiler.set("meshdir", str(path.parent / "meshes"))
    used = set()
    for body in root.iter("body"):
        body.set("gravcomp", "1")
        for geom in list(body.findall("geom")):
            kind, mesh = geom.get("class"), geom.get("mesh")
            if (kind, mesh == "finger_0") in (("visual", False), ("collision", True)):
                body.remove(geom)
            elif kind == "collision":
                geom.attrib.update(contype="0", conaffinity="0", group="1", rgba="0.9 0.9 0.92 1")
                used.add(mesh)
            elif kind == "visual":
                geom.attrib.update(group="1", rgba="0.25 0.25 0.28 1")
                geom.attrib.pop("material", None)
                used.add(mesh)
            elif kind == "fingertip_pad_collision_1":
                geom.attrib.update(
                    name=f"{body.get('name')}_pad", group="3", friction="2 0.05 0.001", condim="4",
                    solref="0.01 1", contype="1", conaffinity="1",
                )  # fmt: skip
            else:
                body.remove(geom)
        if body.get("name") == "hand":
            ElementTree.SubElement(body, "site", name="tool", pos=f"0 0 {TOOL_OFFSET}")
            ElementTree.SubElement(
                body, "camera", name="wrist", pos="0.075 0 0.0", xyaxes="0 1 0 1 0 0.08",
                fovy=str(adapter.WRIST_FOV_Y_DEG),
            )  # fmt: skip
    asset = root.find("asset")
    assert asset is not None
    for mesh_element in list(asset.findall("mesh")):
        if mesh_element.get("name") not in used:
            asset.remove(mesh_element)
    for look in range(TABLES):
        ElementTree.SubElement(
            asset, "texture", name=f"table{look}", type="2d", builtin="flat", width=str(TABLE_TEXTURE),
            height=str(TABLE_TEXTURE), rgb1="1 1 1",
        )  # fmt: skip
        ElementTree.SubElement(asset, "material", name=f"table{look}", texture=f"table{look}", specular="0.1")
    for key in root.findall("keyframe"):
        root.remove(key)
    actuator = root.find("actuator")
    assert actuator is not None
    hand = actuator.find("general")
    assert hand is not None
    # The asset's hand holds 2-4 N; this one squeezes like the real hand.
    hand.attrib.update(gainprm=f"{1000 * 0.04 / 255:.8g} 0 0", biasprm="0 -1000 -40")
    option = root.find("option")
    assert option is not None
    option.attrib.update(timestep=str(TIMESTEP), cone="pyramidal", integrator="implicitfast")
    ElementTree.SubElement(option, "flag", midphase="disable")
    visual = ElementTree.SubElement(root, "visual")
    ElementTree.SubElement(visual, "quality", offsamples="0", shadowsize="0")
    ElementTree.SubElement(visual, "headlight", ambient="0.45 0.45 0.45", diffuse="0.45 0.45 0.45", specular="0 0 0")
    ElementTree.SubElement(visual, "global", offwidth="512", offheight="512")
    ElementTree.SubElement(visual, "map", znear="0.01", zfar="10")
    world = root.find("worldbody")
    assert world is not None
    ElementTree.SubElement(
        world, "light", pos="0.3 0.3 2", dir="0.1 -0.1 -1", diffuse="0.35 0.35 0.35", directional="true",
        castshadow="false",
    )  # fmt: skip
    ElementTree.SubElement(
        world, "geom", name="table", type="box", size="0.6 0.7 0.05", pos="0.5 0 -0.05", material="table0",
        condim="4", friction="1 0.005 0.0001", group="1",
    )  # fmt: skip
    ElementTree.SubElement(
        world, "camera", name="third_person", pos="0.92 0 0.50", xyaxes="0 1 0 -0.70 0 0.714",
        fovy=str(adapter.THIRD_PERSON_FOV_Y_DEG),
    )  # fmt: skip
    return root
