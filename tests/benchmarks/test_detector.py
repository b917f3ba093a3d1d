"""The shipped detector on images of the twin's scene: it says what the task's predicate says, or that it can't tell."""

import pytest
from detector import VARIANTS, measure


def test_the_camera_says_what_is_true() -> None:
    found = measure(scenes=8, size=64)
    total = found["all"]
    assert len(VARIANTS) * 8 >= 50 and total.total() == 4 * 8 * len(VARIANTS)
    assert total["wrong"] <= 0.02 * total.total()
    # It has to commit itself where the object is in sight, and not where it may still be held.
    assert found["on the goal"]["right"] >= 0.95 * found["on the goal"].total()
    assert found["where it was laid"]["right"] >= 0.95 * found["where it was laid"].total()
    assert found["beside the goal"]["right"] >= 0.7 * found["beside the goal"].total()
    assert not found["held over the goal"]["wrong"]


def test_it_is_not_lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that takes the object to be where it was laid fails."""
    import detector

    kept = detector.by_colour
    monkeypatch.setattr(detector, "by_colour", lambda before, after, *rest: kept(before, before, *rest))
    found = measure(scenes=1, size=64)
    assert found["on the goal"]["wrong"] > 0.8 * found["on the goal"].total()
