import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from training import evaluate
from training.envs.base import EpisodeRequest
from training.envs.tabletop import Tabletop, TabletopConfig
from training.evaluate import EvalConfig, Suite, suite_of, summarize
from training.play import FRAME_STRIDE, EpisodeResult, play
from vla.errors import CodedError, SimrealError
from vla.models.nano import NanoConfig
from vla.policy import Policy
from vla.results import interval, score
from vla.statistics import ArrayStatistics, Statistics
from vla.tasks.expert import Expert
from vla.tasks.put_on_plate import ALL_VARIANTS, MAX_STEPS, VARIANTS, axis_of, training_sentences
from vla.tokenizer import train_tokenizer
from vla.types import ActionChunk, Observation

HOLD = np.array([0.0, 0, 0, 0, 0, 0, 1.0])


class Listening(Tabletop):
    """Tells the scripted policies which environments are asked, and when an episode starts."""

    asked: Sequence[int] = ()
    experts: dict[int, Expert]
    played: list[EpisodeRequest]

    def reset(self, index: int, request: EpisodeRequest) -> None:
        super().reset(index, request)
        self.experts[index] = Expert(self.config.max_translation, self.config.max_rotation)
        self.played.append(request)

    def observe(self, indices: Sequence[int]) -> list[Observation]:
        self.asked = list(indices)
        return super().observe(indices)


class ExpertPolicy:
    """Acts as the scripted expert, one step at a time."""

    def __init__(self, env: Listening) -> None:
        self.env = env
        self.seen: list[Observation] = []

    def act(self, observations: list[Observation]) -> list[ActionChunk]:
        self.seen += observations
        actions = [self.env.experts[i].act(self.env.expert_view(i)) for i in self.env.asked]
        return [ActionChunk(a[None], 0.0) for a in actions]


class IdlePolicy:
    """Does nothing, in chunks of a given length."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[Observation] = []

    def act(self, observations: list[Observation]) -> list[ActionChunk]:
        self.seen += observations
        return [ActionChunk(np.tile(HOLD, (self.length, 1)), 0.0) for _ in observations]


@pytest.fixture(scope="module")
def tabletop() -> Iterator[Listening]:
    env = Listening(3, TabletopConfig(image_size=32, chunk=1))
    yield env
    env.close()


@pytest.fixture
def env(tabletop: Listening) -> Listening:
    tabletop.experts, tabletop.played = {}, []
    return tabletop


@pytest.mark.parametrize("variant", ["in_distribution", "object_moved"])
def test_the_expert_succeeds_in_every_episode(env: Listening, variant: str) -> None:
    seeds = [90_005, 90_001, 90_003, 90_002, 90_004]
    results = play(ExpertPolicy(env), env, variant, seeds, film=seeds[1:2])
    assert [r.seed for r in results] == seeds and all(r.success for r in results)
    assert sorted(r.seed for r in env.played) == sorted(seeds)
    assert {r.variant for r in env.played} == {variant}
    assert all(10 < r.steps < MAX_STEPS for r in results)
    filmed = results[1].frames
    assert filmed is not None and filmed.dtype == np.uint8 and filmed.shape[1:] == (192, 192, 3)
    assert len(filmed) == results[1].steps + 1
    assert all(r.frames is None for i, r in enumerate(results) if i != 1)


@pytest.mark.parametrize("length", [5, 8])
def test_doing_nothing_fails_and_takes_all_steps(env: Listening, length: int) -> None:
    policy = IdlePolicy(length)
    results = play(policy, env, "in_distribution", [1, 2, 3, 4], film=[2])
    assert [(r.seed, r.success, r.steps) for r in results] == [(s, False, MAX_STEPS) for s in (1, 2, 3, 4)]
    assert len(policy.seen) == 4 * MAX_STEPS // length, "an episode that is over is not asked again"
    frames = results[1].frames
    assert frames is not None and len(frames) == MAX_STEPS // length * -(-length // FRAME_STRIDE) + 1


def test_the_blind_control_sees_black(env: Listening) -> None:
    policy = IdlePolicy(40)
    play(policy, env, "in_distribution", [1], blind=True)
    play(policy, env, "in_distribution", [1])
    blind, sighted = policy.seen[0], policy.seen[2]
    assert not any(image.any() for image in blind.images.values())
    assert all(image.any() for image in sighted.images.values())
    assert all(blind.state[k].tobytes() == sighted.state[k].tobytes() for k in sighted.state)
    assert blind.instruction == sighted.instruction


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964, by hand
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94331),
        (50, 100, 0.40383, 0.59617),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson(successes: int, episodes: int, low: float, high: float) -> None:
    assert interval(successes, episodes) == pytest.approx((low, high), abs=1e-5)
    entry = score(successes, episodes)
    assert entry["rate"] == successes / episodes and entry["wilson95"] == list(interval(successes, episodes))


def results_of(successes: int, episodes: int) -> list[EpisodeResult]:
    return [EpisodeResult(s, s < successes, 20 + s if s < successes else MAX_STEPS) for s in range(episodes)]


WHOLE = Suite(VARIANTS, ("blind", "wrong_instruction"))


def test_an_axis_is_the_mean_of_its_variants() -> None:
    config = EvalConfig(checkpoint=Path("bundle"), out=Path("unused.json"), episodes=10, seed=90_001)
    rates = {v: i % 10 for i, v in enumerate(WHOLE.variants)}
    summary = summarize({v: results_of(n, 10) for v, n in rates.items()}, config, WHOLE)
    assert list(summary["axes"]) == list(VARIANTS) and len(summary["variants"]) == 15
    for axis, members in VARIANTS.items():
        assert summary["axes"][axis]["rate"] == pytest.approx(np.mean([rates[v] / 10 for v in members]))
        assert summary["axes"][axis]["episodes"] == 10 * len(members)
    outside = [summary["axes"][a]["rate"] for a in ("vision", "semantic", "execution")]
    assert summary["generalization_mean"] == pytest.approx(np.mean(outside))
    controls = {control: entry["successes"] for control, entry in summary["controls"].items()}
    assert controls == {c: rates[c] for c in ("blind", "wrong_instruction")}
    assert summary["mean_steps_of_success"]["unseen_table"] == 20.0 and rates["unseen_table"] == 1
    assert summary["mean_steps_of_success"]["in_distribution"] is None and rates["in_distribution"] == 0
    assert (summary["seed"], summary["checkpoint"]) == (90_001, "bundle")
    json.dumps(summary)
    assert set(summary["outcomes"]) == set(WHOLE.variants)
    assert summary["outcomes"][WHOLE.variants[3]] == "1110000000"
    part = Suite({"in_distribution": ("in_distribution",)})
    short = summarize({"in_distribution": results_of(3, 4)}, replace(config, suite="in_distribution"), part)
    assert list(short["axes"]) == ["in_distribution"] and "generalization_mean" not in short


def test_the_suite_plays_every_variant_and_both_controls() -> None:
    env = Tabletop(1)
    suite = suite_of(EvalConfig(Path("bundle")), env).variants
    assert len(suite) == len(set(suite)) and set(suite) == {*ALL_VARIANTS, "blind"}
    assert {v for v in suite if axis_of(v) == "control"} == {"blind", "wrong_instruction"}
    vision = suite_of(EvalConfig(Path("bundle"), suite="vision", tasks=[0, 4]), env)
    assert vision.variants == ("unseen_table", "dynamic_noise_strong")
    env.close()


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ({"suite": "generalisation"}, "SUITE", "did you mean 'generalization'"),
        ({"suite": "vision", "tasks": [5]}, "TASKS", "members 0 to 4"),
        ({"suite": "vision", "tasks": []}, "TASKS", "members 0 to 4"),
    ],
)
def test_an_unknown_suite_or_task_is_refused(tmp_path: Path, wrong: Any, code: str, words: str) -> None:
    config = EvalConfig(checkpoint=tmp_path, out=tmp_path / "out.json", **wrong)
    with pytest.raises(SimrealError, match=words) as caught:
        evaluate.evaluate(config)
    assert caught.value.code == code and not list(tmp_path.iterdir())


def test_a_killed_evaluation_goes_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EvalConfig(checkpoint, tmp_path / "eval.json", suite="in_distribution", episodes=3, workers=1)
    finished = evaluate._Finished(config)
    finished.add("in_distribution", [EpisodeResult(90_002, True, 17)])
    with finished.file.open("a") as part:
        part.write('{"variant": "in_distribution", "seed": 90003, "succ')  # it was killed here
    with pytest.raises(SimrealError, match="other options"):
        evaluate.evaluate(replace(config, episodes=4))
    summary = evaluate.evaluate(config)
    assert summary["axes"]["in_distribution"]["successes"] >= 1, "the episode that it had played"
    assert summary["axes"]["in_distribution"]["episodes"] == 3 and not finished.file.exists()
    assert "1 variants and controls, 3 episodes" in capsys.readouterr().out


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def test_videos_play(tmp_path: Path) -> None:
    ramp = np.linspace(30, 220, 12).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (12, 48, 64, 3))
    rows = {
        "unseen_table": [
            EpisodeResult(1, True, 20),
            EpisodeResult(2, True, 20, frames),
            EpisodeResult(3, False, 80, frames[::-1]),
        ],
        "blind": [EpisodeResult(1, False, 80, frames)],
    }
    paths = evaluate.write_videos(rows, tmp_path / "videos")
    names = ["unseen_table_success.mp4", "unseen_table_failure.mp4", "blind_failure.mp4"]
    assert [p.name for p in paths] == names == [p.name for p in paths if p.exists()]
    success, failure, _ = (np.stack(frames_of(path)) for path in paths)
    assert success.shape == frames.shape and failure.shape == frames.shape
    for shown, expected in ((success, frames), (failure, frames[::-1])):
        assert np.abs(shown.astype(int) - expected).max() < 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy that fits the simulator."""
    size = NanoConfig(hidden=32, layers=1, heads=2, intermediate=32, n_bins=32)
    env = Tabletop(1)
    contract = env.contract
    bound = [contract.action.max_translation] * 3 + [contract.action.max_rotation] * 3
    statistics = Statistics(
        ArrayStatistics.from_bounds([-b for b in bound] + [0.0], [*bound, 1.0]),
        ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size),
    )
    tokenizer = train_tokenizer(training_sentences(), size.vocabulary, size.prompt_length)
    model = {"class": "nano", **asdict(size)}
    policy = Policy.untrained(model, contract, statistics, tokenizer, seed=1)
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    policy.save(folder)
    return folder


def test_a_checkpoint_is_scored_in_parallel_and_repeatably(checkpoint: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        checkpoint=checkpoint,
        out=tmp_path / "results" / "eval.json",
        suite="in_distribution",
        episodes=3,
        videos=tmp_path / "videos",
        workers=1,
        batch=2,
    )
    summary = evaluate.evaluate(config)
    stored = json.loads(config.out.read_text())
    assert stored == summary and set(stored) >= {"axes", "variants", "seed", "checkpoint"}
    entry = stored["axes"]["in_distribution"]
    assert set(entry) == {"successes", "episodes", "rate", "wilson95"} and entry["episodes"] == 3
    outcomes = {"success": entry["successes"], "failure": 3 - entry["successes"]}
    assert config.videos is not None
    videos = list(config.videos.iterdir())
    assert {v.name for v in videos} == {f"in_distribution_{o}.mp4" for o, number in outcomes.items() if number}
    assert all(len(frames_of(video)) > 10 for video in videos)
    env = Tabletop(1)
    alone = play(Policy.load(checkpoint, env.contract), env, "in_distribution", range(90_001, 90_004))
    env.close()
    assert sum(r.success for r in alone) == entry["successes"]


def test_a_wrong_checkpoint_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    contract = json.loads((foreign / "contract.json").read_text())
    contract["cameras"][0]["height"] = 128
    (foreign / "contract.json").write_text(json.dumps(contract))
    codes = []
    for folder in (foreign, tmp_path / "nothing"):
        config = EvalConfig(checkpoint=folder, out=tmp_path / "out.json", suite="in_distribution", episodes=1)
        with pytest.raises(CodedError) as caught:
            evaluate.evaluate(config)
        codes.append(caught.value.codes)
        assert caught.value.remedy and not config.out.exists()
    assert "CAMERA_SIZE" in codes[0] and codes[1] == ("CHECKPOINT_MISSING",)


@pytest.mark.parametrize("counts", [{"episodes": 0}, {"in_distribution_episodes": 0}])
def test_an_evaluation_without_episodes_is_refused(checkpoint: Path, tmp_path: Path, counts: dict[str, int]) -> None:
    config = EvalConfig(checkpoint, tmp_path / "out.json", **counts)
    with pytest.raises(SimrealError, match="episodes is 1 or more"):
        evaluate.evaluate(config)
    assert not config.out.exists()
