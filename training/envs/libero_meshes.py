"""Meshes that are only looked at, with fewer triangles: scanned things and the arm have a quarter of a million."""

import mujoco
import numpy as np


def coarsen(model: mujoco.MjModel, edge_m: float) -> int:
    """Draw meshes of `model` with edges of about edge_m (m), in place; how many triangles are left out.

    Vertices in a cube of that size become one, the nearest to their mean; triangles whose corners meet are not drawn.
    Every corner keeps its normal and its place in the texture. Meshes that something can touch are left alone, and so
    is all that physics uses. Has to come before the meshes are given to a renderer.
    """
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    is_touched = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    touched = set(model.geom_dataid[is_mesh & is_touched].tolist())
    fewer = 0
    for mesh in set(model.geom_dataid[is_mesh].tolist()) - touched:
        first, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        vertices = model.mesh_vert[first : first + count]
        first, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        faces = slice(first, first + count)
        corners = _merged(vertices, edge_m)[model.mesh_face[faces]]
        drawn = np.flatnonzero((corners != np.roll(corners, 1, axis=1)).all(1))
        drawn = drawn[np.unique(np.sort(corners[drawn], axis=1), axis=0, return_index=True)[1]]
        if not len(drawn):  # smaller than a cube
            continue
        kept = slice(first, first + len(drawn))
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            values = getattr(model, name)
            values[kept] = values[faces][drawn]
        model.mesh_face[kept] = corners[drawn]
        model.mesh_facenum[mesh] = len(drawn)
        fewer += count - len(drawn)
    return fewer


def _merged(vertices: np.ndarray, edge_m: float) -> np.ndarray:
    """For every vertex of `[n, 3]` the number of the one that stands for it."""
    cubes = np.unique(np.floor((vertices - vertices.min(0)) / edge_m), axis=0, return_inverse=True)[1].reshape(-1)
    sums = np.stack([np.bincount(cubes, axis) for axis in vertices.T], 1)
    means = sums / np.bincount(cubes)[:, None]
    distances = np.square(vertices - means[cubes]).sum(1)
    order = np.lexsort((distances, cubes))
    nearest = order[np.unique(cubes[order], return_index=True)[1]]
    return nearest[cubes]
