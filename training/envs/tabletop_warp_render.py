"""Images of many worlds by ray tracing on the device, lit as MuJoCo's own renderer lights the tabletop.

MuJoCo Warp's renderer knows neither the headlight nor textures on boxes. So its bounding volumes and its ray casting
are taken, and the colours are worked out here: ambient and diffuse headlight, one directional light, the table's look.
"""

import numpy as np
import torch

from training.envs.tabletop_warp_physics import Physics, mjw, wp
from vla.tasks import mjcf

# Private, like the arguments below: pyproject.toml pins the version.
from mujoco_warp._src.render import cast_ray  # isort: skip

# MuJoCo's defaults for a geom without material, and what `mjcf` gives the table's.
SPECULAR, TABLE_SPECULAR = wp.constant(0.5), wp.constant(0.1)
SHININESS = wp.constant(64.0)  # half of OpenGL's largest exponent


@wp.func
def _texel(textures: wp.array4d[wp.uint8], look: int, x: int, y: int) -> wp.vec3:
    size = textures.shape[1]
    u = (x % size + size) % size
    v = (y % size + size) % size
    return wp.vec3(float(textures[look, v, u, 0]), float(textures[look, v, u, 1]), float(textures[look, v, u, 2])) * (
        1.0 / 255.0
    )


@wp.func
def _table_color(textures: wp.array4d[wp.uint8], look: int, local: wp.vec3, size: wp.vec3) -> wp.vec3:
    """The texture lies once over the table, repeats at its borders and is interpolated bilinearly."""
    count = float(textures.shape[1])
    x = (0.5 * local[0] / size[0] + 0.5) * count - 0.5
    y = (0.5 - 0.5 * local[1] / size[1]) * count - 0.5
    left, top = wp.floor(x), wp.floor(y)
    a, b = x - left, y - top
    i, j = int(left), int(top)
    upper = _texel(textures, look, i, j) * (1.0 - a) + _texel(textures, look, i + 1, j) * a
    lower = _texel(textures, look, i, j + 1) * (1.0 - a) + _texel(textures, look, i + 1, j + 1) * a
    return upper * (1.0 - b) + lower * b


@wp.func
def _lit(
    base: wp.vec3, normal: wp.vec3, ray: wp.vec3, axis: wp.vec3, light: wp.vec3, ambient: float, head: float,
    diffuse: float, gloss: float,
) -> wp.vec3:  # fmt: skip
    """Colour of a surface seen along `ray`; `axis` points back along the camera's, `light` where the light shines."""
    lighted = wp.max(0.0, -wp.dot(normal, light))
    color = base * (ambient + head * wp.max(0.0, wp.dot(normal, axis)) + diffuse * lighted)
    if lighted > 0.0:  # Blinn 1977
        shine = gloss * wp.pow(wp.max(0.0, wp.dot(normal, wp.normalize(-light - ray))), SHININESS)
        color = color + wp.vec3(shine, shine, shine)
    return wp.min(color, wp.vec3(1.0, 1.0, 1.0))


@wp.kernel(enable_backward=False)
def _draw(
    geom_type: wp.array[int],
    geom_dataid: wp.array2d[int],
    geom_size: wp.array2d[wp.vec3],
    geom_rgba: wp.array2d[wp.vec4],
    cam_fovy: wp.array2d[float],
    flex_vertadr: wp.array[int],
    flex_edge: wp.array[wp.vec2i],
    flex_radius: wp.array[float],
    geom_xpos: wp.array2d[wp.vec3],
    geom_xmat: wp.array2d[wp.mat33],
    cam_xpos: wp.array2d[wp.vec3],
    cam_xmat: wp.array2d[wp.mat33],
    flexvert_xpos: wp.array2d[wp.vec3],
    bvh_id: wp.uint64,
    group_root: wp.array[int],
    bvh_ngeom: int,
    enabled_geom_ids: wp.array[int],
    mesh_bvh_id: wp.array[wp.uint64],
    hfield_bvh_id: wp.array[wp.uint64],
    flex_geom_flexid: wp.array[int],
    flex_geom_edgeid: wp.array[int],
    flex_bvh_id: wp.array[wp.uint64],
    flex_group_root: wp.array2d[int],
    mesh_faceadr: wp.array[int],
    mesh_vertadr: wp.array[int],
    mesh_normaladr: wp.array[int],
    mesh_face: wp.array[wp.vec3i],
    mesh_vert: wp.array[wp.vec3],
    mesh_normal: wp.array[wp.vec3],
    mesh_facenormal: wp.array[wp.vec3i],
    textures: wp.array4d[wp.uint8],
    table: int,
    looks: wp.array[int],
    ambient: wp.array[float],
    head: float,
    light: wp.vec3,
    diffuse: float,
    specular: float,
    near: float,
    worlds: wp.array[int],
    cameras: wp.array[int],
    image: wp.array4d[wp.uint8],
    geoms: wp.array3d[int],
):
    shot, y, x = wp.tid()
    world = worlds[shot // cameras.shape[0]]
    camera = cameras[shot % cameras.shape[0]]
    size = float(image.shape[1])
    frame = cam_xmat[world, camera]
    scale = wp.tan(0.5 * cam_fovy[world % cam_fovy.shape[0], camera] * (wp.pi / 180.0))
    sight = wp.vec3(scale * (2.0 * (float(x) + 0.5) / size - 1.0), scale * (1.0 - 2.0 * (float(y) + 0.5) / size), -1.0)
    # The ray begins at the near plane, as what lies before it is not drawn.
    origin = cam_xpos[world, camera] + frame @ (sight * near)
    ray = frame @ wp.normalize(sight)
    geom, distance, normal, u, v, face, mesh = cast_ray(
        geom_type, geom_dataid, geom_size, flex_vertadr, flex_edge, flex_radius, geom_xpos, geom_xmat, flexvert_xpos,
        bvh_id, group_root[world], world, bvh_ngeom, 0, enabled_geom_ids, mesh_bvh_id, hfield_bvh_id, flex_geom_flexid,
        flex_geom_edgeid, flex_bvh_id, flex_group_root, origin, ray, True,
    )  # fmt: skip
    geoms[shot, y, x] = geom
    color = wp.vec3(0.0, 0.0, 0.0)
    if geom >= 0:
        turned = geom_xmat[world, geom]
        rgba = geom_rgba[world % geom_rgba.shape[0], geom]
        base = wp.vec3(rgba[0], rgba[1], rgba[2])
        gloss = specular
        if geom == table:
            base = wp.vec3(1.0, 1.0, 1.0)
            gloss = specular * TABLE_SPECULAR / SPECULAR
        # The headlight shines along the camera's axis, which is its third column turned round.
        axis = wp.vec3(frame[0, 2], frame[1, 2], frame[2, 2])
        if face >= 0 and mesh >= 0:  # as OpenGL does: the corners of a face are lit, and between them colours change
            shares = wp.vec3(u, v, 1.0 - u - v)
            corners = mesh_face[mesh_faceadr[mesh] + face]
            normals = mesh_facenormal[mesh_faceadr[mesh] + face]
            for k in range(3):
                point = geom_xpos[world, geom] + turned @ mesh_vert[mesh_vertadr[mesh] + corners[k]]
                smooth = wp.normalize(turned @ mesh_normal[mesh_normaladr[mesh] + normals[k]])
                sightline = wp.normalize(point - cam_xpos[world, camera])
                color += shares[k] * _lit(base, smooth, sightline, axis, light, ambient[world], head, diffuse, gloss)
        else:
            color = _lit(base, normal, ray, axis, light, ambient[world], head, diffuse, gloss)
        if geom == table:  # OpenGL cuts the light before the texture dims it
            local = wp.transpose(turned) @ (origin + ray * distance - geom_xpos[world, geom])
            texel = _table_color(textures, looks[world], local, geom_size[world % geom_size.shape[0], geom])
            color = wp.cw_mul(color, texel)
    for channel in range(3):
        level = wp.clamp(color[channel], 0.0, 1.0) * 255.0 + 0.5
        image[shot, y, x, channel] = wp.uint8(int(level))


class Renderer:
    """Images of the worlds of one `Physics`, at any size and from any of its cameras."""

    def __init__(self, physics: Physics):
        self._physics, host, device = physics, physics.host, str(physics.device)
        with physics.stream():
            # Its own images are never drawn, so they are as small as can be.
            self._context = mjw.create_render_context(host, physics.count, (1, 1), True, False, False, False)
            self._textures = wp.array(
                np.stack([mjcf.table_texture(look) for look in range(mjcf.TABLES)]), dtype=wp.uint8, device=device
            )
            self._face_normals = wp.array(host.mesh_facenormal, dtype=wp.vec3i, device=device)
        self.table = host.geom("table").id
        self._ambient, self._head = (float(v[0]) for v in (host.vis.headlight.ambient, host.vis.headlight.diffuse))
        self._light, self._diffuse = wp.vec3(*host.light_dir[0]), float(host.light_diffuse[0, 0])
        self._specular = SPECULAR * float(host.light_specular[0, 0])
        self._near = float(host.vis.map.znear * host.stat.extent)

    def render(
        self, worlds: torch.Tensor, cameras: tuple[str, ...], size: int, looks: torch.Tensor, light: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the named worlds `[k]` from every camera.

        looks, light: of all worlds `[n]`, number of the table's look and factor of the ambient light. Returns RGB uint8
        `[k, cameras, size, size, 3]` and the geom that each pixel shows, int32 `[k, cameras, size, size]`.
        """
        physics, m, d, rc = self._physics, self._physics.model, self._physics.data, self._context
        views = torch.tensor([physics.host.camera(c).id for c in cameras], dtype=torch.int32, device=physics.device)
        shape = (len(worlds) * len(cameras), size, size)
        image = torch.empty(*shape, 3, dtype=torch.uint8, device=physics.device)
        geoms = torch.empty(shape, dtype=torch.int32, device=physics.device)
        with physics.stream():
            mjw.refit_bvh(m, d, rc)
            wp.launch(
                _draw,
                dim=shape,
                inputs=[
                    m.geom_type, m.geom_dataid, m.geom_size, m.geom_rgba, m.cam_fovy, m.flex_vertadr, m.flex_edge,
                    m.flex_radius, d.geom_xpos, d.geom_xmat, d.cam_xpos, d.cam_xmat, d.flexvert_xpos, rc.bvh_id,
                    rc.group_root, rc.bvh_ngeom, rc.enabled_geom_ids, rc.mesh_bvh_id, rc.hfield_bvh_id,
                    rc.flex_geom_flexid, rc.flex_geom_edgeid, rc.flex_bvh_id, rc.flex_group_root, m.mesh_faceadr,
                    m.mesh_vertadr, m.mesh_normaladr, m.mesh_face, m.mesh_vert, m.mesh_normal, self._face_normals,
                    self._textures, self.table,
                    wp.from_torch(looks.int()), wp.from_torch((light * self._ambient).float()), self._head, self._light,
                    self._diffuse, self._specular, self._near, wp.from_torch(worlds.int()), wp.from_torch(views),
                ],
                outputs=[wp.from_torch(image), wp.from_torch(geoms)],
            )  # fmt: skip
        return image.reshape(len(worlds), len(cameras), size, size, 3), geoms.reshape(len(worlds), -1, size, size)
