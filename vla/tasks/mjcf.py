"""Put-on-plate items as plain MJCF elements, for the tabletop simulator and for the robot's twin alike."""

import math
from xml.etree import ElementTree

from vla.tasks.put_on_plate import Item, Placement

MAX_PARTS = 2  # no item has more parts than this
OBJECT_FRICTION = "1 0.005 0.0003"
BALL_FRICTION = "1 0.01 0.003"


def _numbers(values: tuple[float, ...] | list[float]) -> str:
    return " ".join(f"{v:.6g}" for v in values)


def add_item(world: ElementTree.Element, name: str, item: Item, free: bool) -> ElementTree.Element:
    """Append a body with the item's parts to `world`; a `free` one can be pushed and lifted."""
    body = ElementTree.SubElement(world, "body", name=name)
    if free:
        ElementTree.SubElement(body, "freejoint", name=f"{name}_joint")
    for index, part in enumerate(item.parts):
        shade = 1.0 if index == 0 else 0.80
        geom = ElementTree.SubElement(
            body,
            "geom",
            name=f"{name}_part{index}",
            type=part.kind,
            size=_numbers(part.size),
            pos=_numbers(part.offset),
            rgba=_numbers([*(shade * c for c in item.color), 1.0]),
            mass=f"{item.mass / len(item.parts):.6g}",
            condim="4",
            friction=OBJECT_FRICTION,
        )
        if part.kind == "sphere":
            geom.set("condim", "6")
            geom.set("friction", BALL_FRICTION)
    return body


def place(body: ElementTree.Element, placement: Placement) -> None:
    """Put a body where an episode wants it, resting on the table."""
    half = placement.yaw / 2
    body.set("pos", _numbers([placement.x, placement.y, placement.item.half_height]))
    body.set("quat", _numbers([math.cos(half), 0.0, 0.0, math.sin(half)]))
