"""The pictures of views and residuals show what was found."""

import numpy as np

from calibration import pictures, rendering
from calibration.detection import detect
from vla.rig import BoardSize, Intrinsics

CAMERA, BOARD = Intrinsics("pinhole", 640, 480, 600.0, 600.0, 319.5, 239.5), BoardSize()


def test_an_error_to_the_right_is_an_arrow_to_the_right() -> None:
    rng = np.random.default_rng(0)
    pose = rendering.look_at(0.5, (10.0, 5.0), 0.0, (320.0, 240.0), CAMERA, BOARD)
    view = rendering.corners(CAMERA, BOARD, pose, 0.0, rng)
    shifted = Intrinsics("pinhole", 640, 480, 600.0, 600.0, 321.5, 239.5)  # its points are 2 px further right
    (away,) = pictures.errors([view], [pose], shifted, BOARD)
    assert np.allclose(away, [2.0, 0.0], atol=1e-6)
    drawn = pictures.residuals([view], [away], shifted)
    shown = drawn.astype(int)
    red = (shown[..., 0] > shown[..., 1] + 60)[:440]
    columns = np.flatnonzero(red.any(0))
    assert abs(columns.min() - view.corners[:, 0].min()) < 4
    assert abs(columns.max() - (view.corners[:, 0].max() + pictures.ARROW_PX)) < 4


def test_the_sheet_has_every_view_with_its_corners() -> None:
    rng = np.random.default_rng(0)
    images = []
    for middle in ((250.0, 240.0), (400.0, 240.0)):
        pose = rendering.look_at(0.6, (0.0, 0.0), 0.0, middle, CAMERA, BOARD)
        images.append(np.repeat(rendering.render(CAMERA, BOARD, pose, rng)[..., None], 3, -1))
    views = [detect(image, BOARD) for image in images]
    made = pictures.sheet(images, views, columns=2)
    assert made.shape == (124, 328, 3)
    for tile in (made[:120, :160], made[:120, 164:324]):
        assert (tile[..., 0].astype(int) > tile[..., 2] + 60).sum() > 3 * len(views[0])
