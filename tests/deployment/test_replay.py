"""Replay: a checkpoint's own actions come out again, others are told apart, and what can't be replayed is left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployment import replay_command
from deployment.replay import agreement, play
from deployment.replay_command import ReplayConfig
from vla.contract import ContractError
from vla.episode_reader import Episode
from vla.errors import SimrealError
from vla.message_types import header
from vla.policy import Policy
from vla.recording import Recording
from vla.rig import CameraCalibration, Delay, Intrinsics, Measured, Store, attachment

Record = Callable[..., Path]


@pytest.fixture
def other(bundle: Path, tmp_path: Path) -> Path:
    """A checkpoint of the same contract that acts otherwise."""
    policy = Policy.load(bundle, None)
    model: Any = policy.model
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.abs().mean() * (1 + parameter.data.sign())
    policy.save(tmp_path / "other")
    data = json.loads((tmp_path / "other" / "provenance.json").read_text())
    (tmp_path / "other" / "provenance.json").write_text(json.dumps({**data, "seed": 99}))
    return tmp_path / "other"


def result(config: ReplayConfig) -> tuple[int, dict[str, Any]]:
    assert config.out is not None
    code = replay_command.run(config)
    return code, json.loads(config.out.read_text())


def test_what_a_policy_has_recorded_comes_out_again_bit_for_bit(tmp_path: Path, policy: Policy, record: Record) -> None:
    found = play(Recording(Episode(record(tmp_path, policy))), policy)
    assert found.has_decisions and found.decisions == len(found.answers) == 10 and not found.missing
    # The recorded observations were made by the simulator's path, these by the robot's.
    assert found.observations_equal == found.actions_equal == 10 and found.greatest == 0.0
    assert found.chunks_equal == found.chunks == 10


def test_two_checkpoints_side_by_side(
    tmp_path: Path, bundle: Path, other: Path, policy: Policy, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        record(tmp_path / "episodes", Policy.load(bundle, None), number=number)
    config = ReplayConfig(tmp_path / "episodes", [bundle, other], out=tmp_path / "replay.json")
    code, found = result(config)
    own, another = found["checkpoints"]
    assert code == 0 and own["actions_equal"] == own["decisions"] == 20 and another["actions_equal"] < 20
    assert own["mean_error"] != another["mean_error"] and len(own["by_row_mm"]) == 8
    assert own["gripper"] is not None and own["overlap_mm"] is not None and own["latency_ms"]["p50"] > 0
    assert (tmp_path / "replay.png").stat().st_size > 10_000 and "bit for bit" in capsys.readouterr().out


def test_a_checkpoint_that_no_longer_gives_its_own_actions_is_told(
    tmp_path: Path, bundle: Path, other: Path, record: Record
) -> None:
    record(tmp_path / "episodes", Policy.load(other, None))
    (file,) = (tmp_path / "episodes").iterdir()
    attached = Episode(file).attachments["provenance.json"]
    (other / "provenance.json").write_bytes(attached)
    assert result(ReplayConfig(file, [other], out=tmp_path / "a.json"))[0] == 0
    model = other / "model.safetensors"
    model.write_bytes((bundle / "model.safetensors").read_bytes())
    code, found = result(ReplayConfig(file, [other], out=tmp_path / "b.json"))
    assert code == 1 and found["checkpoints"][0]["recorded_by_it"] == 1


def test_the_error_against_what_was_executed_is_that_of_the_reference(
    tmp_path: Path, policy: Policy, record: Record
) -> None:
    recording = Recording(Episode(record(tmp_path, policy)))
    begin = recording.decisions[0][1].chunk.stamp
    rows = recording.executed(begin, 4)
    times = begin + np.arange(5) / 20
    positions, _ = recording.commanded.at(times)
    assert np.allclose(rows[:, :3], np.diff(positions, axis=0)) and np.allclose(rows[:, 3:6], 0.0)
    assert np.isnan(recording.executed(recording.episode.end_ns / 1e9, 4)).all()
    opened = recording.openings[0]
    assert recording.opened(opened.since + 0.02) == bool(opened.open[1])  # the row of 70 ms after the stamp
    recording.openings = []
    assert recording.opened(begin) and not recording.opened(begin + 2.0)  # as the fingers went
    found = play(recording, policy)
    expected = np.concatenate([a.chunk.actions - a.executed for a in found.answers])
    agreed = agreement([found], 20.0)
    assert np.allclose(agreed.mean_error, np.nanmean(np.abs(expected), 0))
    assert agreed.rows == 8 * 9 + 5  # the last decision is 0.3 s before the end


def test_a_camera_that_was_away_for_a_while_is_counted(tmp_path: Path, policy: Policy, record: Record) -> None:
    def away(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any] | None:
        return None if topic.startswith("wrist") and 1.0 < since < 2.0 else message

    found = play(Recording(Episode(record(tmp_path, policy, edit=away))), policy)
    assert found.decisions == 10 and found.missing == 3 and found.actions_equal == 7


LATE = 0.06  # s: of a camera whose driver stamps an image when it arrives


@pytest.mark.parametrize("told", ["by the decision", "by the calibration", "by nobody"])
def test_the_delay_of_a_camera_that_the_policy_took_off_is_taken_off_again(
    tmp_path: Path, policy: Policy, record: Record, told: str
) -> None:
    def stamped(seconds: float) -> tuple[dict[str, Any], float]:
        late = header(seconds + LATE)
        stamp = late["stamp"]
        return late, float(stamp["sec"]) + 1e-9 * float(stamp["nanosec"]) - LATE

    def delayed(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any]:
        if topic.startswith("wrist"):
            stamp = message["header"]["stamp"]
            message["header"], _ = stamped(stamp["sec"] + 1e-9 * stamp["nanosec"])
        elif topic == "decision":
            data = json.loads(message["data"])
            _, data["stamps"]["wrist"] = stamped(data["stamps"]["wrist"])
            message["data"] = json.dumps({**data, **({"late": {"wrist": LATE}} if told == "by the decision" else {})})
        return message

    found = Measured("2026-11-26T08:00:00+00:00", "a test", 1, 0.1)
    delay = Delay(LATE, (LATE, LATE), 0.0, (0.0, 0.0), 0.0, (0.0, 0.0), found)
    Store(tmp_path / "rig").write(CameraCalibration("wrist", Intrinsics.from_fov(64, 64, 60.0), found, delay=delay))
    kept = {"calibration.json": attachment(tmp_path / "rig", ["third_person", "wrist"])}
    file = record(tmp_path, policy, edit=delayed, attached=kept if told == "by the calibration" else {})
    recording = Recording(Episode(file))
    replayed = play(recording, policy)
    assert replayed.has_decisions and replayed.decisions == 10
    if told == "by nobody":
        assert not recording.late and replayed.missing == 10
        return
    assert recording.late == {"wrist": LATE} and not replayed.missing
    assert replayed.observations_equal == replayed.actions_equal == 10 and replayed.greatest == 0.0
    assert replayed.chunks_equal == replayed.chunks == 10


def test_a_state_that_was_not_recorded_costs_one_decision(tmp_path: Path, policy: Policy, record: Record) -> None:
    def lost(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any] | None:
        return None if topic == "commanded_pose" and 0.595 < since < 0.605 else message

    found = play(Recording(Episode(record(tmp_path, policy, edit=lost))), policy)
    # The state of that cycle was never complete, so the policy can't have seen it as it says; others are not touched.
    assert found.missing == 1 and found.observations_equal == found.actions_equal == 9


def test_an_episode_without_decisions_is_replayed_where_a_policy_would_have_looked(
    tmp_path: Path, policy: Policy, record: Record
) -> None:
    def older(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any] | None:
        return None if topic == "decision" else message

    found = play(Recording(Episode(record(tmp_path, policy, edit=older))), policy)
    assert not found.has_decisions and 9 <= found.decisions <= 11 and found.observations_equal == 0


@pytest.mark.parametrize("jump", [-1.0, 30.0])
def test_clocks_that_jump_are_refused(tmp_path: Path, policy: Policy, record: Record, jump: float) -> None:
    def jumped(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any]:
        if since > 1.5 and topic == "current_pose":
            message["header"]["stamp"]["sec"] += int(jump)
        return message

    episode = Episode(record(tmp_path, policy, edit=jumped))
    with pytest.raises(SimrealError) as caught:
        Recording(episode)
    assert caught.value.code == "CLOCK_JUMPED" and "current_pose" in str(caught.value)


def test_a_contract_mismatch_is_refused(tmp_path: Path, policy: Policy, record: Record, bundle: Path) -> None:
    recording = Recording(Episode(record(tmp_path, policy)))
    action = replace(policy.contract.action, rate_hz=10.0)
    recording.contract = replace(recording.contract, action=action)
    with pytest.raises(ContractError) as caught:
        play(recording, policy)
    assert caught.value.codes == ("ACTION_RATE",) and "episode_000001" in str(caught.value)
    assert recording.offered.statistics_hash is None


def test_broken_and_foreign_files_are_left_out_and_told(
    tmp_path: Path, policy: Policy, bundle: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "episodes"
    whole = record(folder, policy)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(0.7 * len(data))])
    (folder / "foreign.mcap").write_text("not a bag")
    code, found = result(ReplayConfig(folder, [bundle], out=tmp_path / "replay.json"))
    assert code == 1 and list(found["refused"]) == ["foreign.mcap"] and "NOT_MCAP" in capsys.readouterr().out
    assert 0 < found["checkpoints"][0]["decisions"] < 10
    with pytest.raises(SimrealError) as caught:
        replay_command.run(ReplayConfig(folder / "foreign.mcap", [bundle], out=None))
    assert caught.value.code == "NO_EPISODES"
    with pytest.raises(SimrealError) as caught:
        replay_command.run(ReplayConfig(folder))
    assert caught.value.code == "NO_CHECKPOINT"
