"""The tabletop's scene as MJCF: the FR3 of the `franky-sim` package, table, light and cameras."""

from pathlib import Path
from xml.etree import ElementTree

from vla.tasks import mjcf

TIMESTEP = 0.002  # s


def _fr3_asset() -> Path:
    import franky_sim

    return Path(franky_sim.__file__).parent / "assets" / "fr3.xml"


def robot_scene() -> ElementTree.Element:
    """The FR3, simplified, with tool, cameras, table and light."""
    path = _fr3_asset()
    root = ElementTree.parse(path).getroot()
    parts = {name: root.find(name) for name in ("compiler", "asset", "actuator", "option", "worldbody")}
    compiler, asset, actuator, option, world = parts.values()
    assert compiler is not None and asset is not None and option is not None and world is not None
    compiler.set("meshdir", str(path.parent / "meshes"))
    for body in root.iter("body"):
        body.set("gravcomp", "1")
    used = mjcf.simplify_arm(root)
    for mesh in list(asset.findall("mesh")):
        if mesh.get("name") not in used:
            asset.remove(mesh)
    mjcf.add_table_looks(asset)
    for key in root.findall("keyframe"):
        root.remove(key)
    assert actuator is not None
    hand = actuator.find("general")
    assert hand is not None
    # The asset's hand holds 2-4 N; this one squeezes like the real hand.
    hand.attrib.update(gainprm=f"{1000 * 0.04 / 255:.8g} 0 0", biasprm="0 -1000 -40")
    option.attrib.update(timestep=str(TIMESTEP), cone="pyramidal", integrator="implicitfast")
    ElementTree.SubElement(option, "flag", midphase="disable")
    mjcf.add_graphics(root)
    mjcf.add_surroundings(world)
    return root
