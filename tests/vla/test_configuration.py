"""Composition by Hydra, the dataclass check behind it, and what is refused."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vla import options
from vla.configuration import available_groups, experiments, load
from vla.errors import ConfigError


@dataclass(frozen=True)
class Env:
    """image_size: px; parallel: environments."""

    image_size: int = 64
    parallel: int = 2


@dataclass(frozen=True)
class WindyEnv(Env):
    """wind: m/s."""

    wind: float = 1.0


@dataclass(frozen=True)
class Algorithm:
    """Options of the update.

    learning_rate: step size
        of the optimiser.
    level: ratio of the objective.
    betas: of Adam.
    """

    learning_rate: float = 1e-3
    level: Literal["token", "action"] = "token"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate}")


@dataclass(frozen=True)
class Part(ABC):
    """Has to be chosen."""

    @abstractmethod
    def work(self) -> int: ...


@dataclass(frozen=True)
class Wheel(Part):
    """spokes: of the wheel."""

    spokes: int = 3

    def work(self) -> int:
        return self.spokes


@dataclass(frozen=True)
class Run:
    """out: folder; seed: of everything; limit: episodes at most; weights: by name."""

    out: Path
    env: Env = field(default_factory=Env, metadata={"also": ("simulator",)})
    algorithm: Algorithm = field(default_factory=Algorithm)
    seed: int = 0
    batch: int = 8
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    part: Part = field(default_factory=Wheel)


@dataclass(frozen=True)
class Sweep:
    """variants: what is compared; seed: of all."""

    variants: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 0


FILES = {
    "run.yaml": (
        "defaults: [{env: calm}, {part: wheel}, {algorithm: ppo}, _self_, {experiment: null}]\n"
        "out: runs/x\nseed: 1\nbatch: ${env.parallel}\n"
    ),
    "env/calm.yaml": "image_size: 32\n",
    "env/windy.yaml": f"_target_: {__name__}.WindyEnv\nwind: 3\n",
    "env/foreign.yaml": f"_target_: {__name__}.Algorithm\n",
    "env/typo.yaml": "image_sise: 32\n",
    "part/wheel.yaml": f"_target_: {__name__}.Wheel\n",
    "part/none.yaml": "spokes: 4\n",
    "part/missing.yaml": "_target_: no_such_package.Wheel\n",
    "robot/arm.yaml": "joints: 7\n",
    "algorithm/ppo.yaml": "learning_rate: 3.0e-4\n",
    "experiment/big.yaml": (
        "# @package _global_\ndefaults: [{override /env: windy}]\nseed: 7\nalgorithm: {level: action}\n"
    ),
    "experiment/sweep.yaml": "# @package _global_\nseed: 7\nvariants: {a: []}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def compose(folder: Path, *overrides: str) -> Run:
    return load(Run, "run", overrides, folder)


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(folder, *overrides)
    return str(caught.value)


def test_files_defaults_and_types(folder: Path) -> None:
    config = compose(folder)
    assert config == Run(Path("runs/x"), Env(32), Algorithm(3e-4), seed=1, batch=2)
    assert isinstance(config.out, Path) and isinstance(config.algorithm.betas, tuple)


def test_experiment_lies_over_the_primary_file_and_under_the_command_line(folder: Path) -> None:
    config = compose(folder, "experiment=big", "env.parallel=5")
    assert (config.seed, config.algorithm.level, config.algorithm.learning_rate) == (7, "action", 3e-4)
    assert config.env == WindyEnv(parallel=5, wind=3.0) and config.batch == 5
    assert compose(folder, "experiment=big", "seed=9").seed == 9


@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
def test_an_experiment_of_ones_own_is_taken_by_its_path(folder: Path, tmp_path: Path, header: str) -> None:
    own = tmp_path / "elsewhere/big.yaml"  # also the name of one of the project's
    own.parent.mkdir()
    own.write_text(f"{header}defaults: [{{override /env: windy}}]\nseed: 8\n")
    config = compose(folder, f"experiment={own}", "env.parallel=5")
    assert (config.seed, config.env, config.algorithm.level) == (8, WindyEnv(parallel=5, wind=3.0), "token")
    own.write_text("variants: {a: []}\n")
    assert "for another command: it sets variants" in refusal(folder, f"experiment={own}")


def test_a_command_offers_the_experiments_that_it_can_take(folder: Path) -> None:
    assert experiments(folder, Run) == ["big"] and experiments(folder, Sweep) == ["sweep"]


def test_overrides_reach_keys_that_only_the_dataclass_has(folder: Path) -> None:
    config = compose(folder, "limit=1e3", "weights.grasp=2", "algorithm.betas=[0,0.5]", "out=a folder (1)")
    assert config.limit == 1000 and isinstance(config.limit, int)
    assert config.weights == {"grasp": 2.0} and config.algorithm.betas == (0.0, 0.5)
    assert config.out == Path("a folder (1)")
    assert compose(folder, "algorithm={learning_rate:1,level:action}").algorithm == Algorithm(1.0, "action")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown key 'sede': did you mean 'seed'?"),
        ("algoritm.level=token", "unknown key 'algoritm.level': did you mean 'algorithm.level'?"),
        ("learning_rate=1", "unknown key 'learning_rate': did you mean 'algorithm.learning_rate'?"),
        ("env.wind=1", "unknown key 'env.wind'"),  # the calm environment has none
        ("quux=1", "valid names: algorithm.betas, "),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("env=clam", "did you mean 'calm'?"),
        ("env=typo", "unknown key 'env.image_sise': did you mean 'env.image_size'?"),
        ("env=foreign", "test_configuration.Algorithm is not a kind of Env"),
        ("simulator=windy", "unknown key 'simulator': the option is 'env'"),
        ("simulator.wind=1", "unknown key 'simulator.wind': the option is 'env'"),
        ("robot=arm", "unknown key 'robot'"),  # a group, but not of this command
        ("part=none", "'part._target_' is required: name the Part as _target_: package.module.Class"),
        ("part=missing", "put its folder on PYTHONPATH"),
        ("env=absent.yaml", "absent.yaml can't be read"),
        ("experiment=absent.yaml", "absent.yaml can't be read"),
        ("experiment=bigger", "experiment=bigger: no such file"),
        ("experiment=sweep", "experiment=sweep is for another command: it sets variants"),
        ("seed=abc", "'seed': expected int, found 'abc'"),
        ("seed=1.5", "'seed': expected int, found 1.5"),
        ("seed=true", "'seed': expected int, found True"),
        ("limit=many", "'limit': expected int | null, found 'many'"),
        ("algorithm.level=acton", "expected 'token' | 'action', found 'acton'; did you mean 'action'?"),
        ("algorithm.betas=[1]", "'algorithm.betas': expected tuple[float, float], found [1]"),
        ("algorithm.learning_rate=-1", "algorithm: learning_rate must be positive, found -1.0"),
        ("weights.grasp=x", "'weights.grasp': expected float, found 'x'"),
        ("seed=1,2", "for a list write seed=[1,2]"),
        ("seed", "write key=value"),
        ("+seed=1", "write key=value"),
        ("out=???", "'out' is required"),
        ("batch=${env.parallle}", "parallle"),
    ],
)
def test_refusals_say_what_to_write(folder: Path, override: str, message: str) -> None:
    assert message in refusal(folder, override)


def test_a_file_of_ones_own_takes_the_place_of_a_group(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.mktemp("elsewhere") / "own.yaml"
    own.write_text(f"_target_: {__name__}.WindyEnv\nparallel: 9\n")
    config = compose(folder, f"env={own}", "env.wind=2")
    assert config.env == WindyEnv(parallel=9, wind=2.0) and config.batch == 9
    own.write_text("parallle: 9\n")
    assert "unknown key 'env.parallle': did you mean 'env.parallel'?" in refusal(folder, f"env={own}")
    own.write_text("{")
    assert f"{own} can't be read" in refusal(folder, f"env={own}")


def test_every_problem_of_the_files_is_named_at_once(folder: Path) -> None:
    (folder / "run.yaml").write_text("sed: 1\nbatch: x\n")
    text = refusal(folder)
    assert "unknown key 'sed': did you mean 'seed'?" in text
    assert "'batch': expected int, found 'x'" in text and "'out' is required (folder): give out=VALUE" in text


def test_a_missing_primary_file_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"configs/absent\.yaml"):
        load(Run, "absent", [], folder)


def test_a_command_without_a_file_takes_its_dataclass() -> None:
    assert load(Run, None, ["out=x", "env.image_size=8"]) == Run(Path("x"), Env(8))


@dataclass(frozen=True)
class Show:
    """images: files. pair: two of them."""

    images: tuple[Path, ...] = ()
    pair: tuple[str, str] = ("a", "b")


def test_a_text_alone_is_a_list_of_one() -> None:
    assert load(Show, overrides=["images=A.png"]).images == (Path("A.png"),)
    assert load(Show, overrides=["images=[A.png,B.png]"]).images == (Path("A.png"), Path("B.png"))
    with pytest.raises(ConfigError, match="expected tuple"):
        load(Show, overrides=["pair=ab"])


def test_what_is_written_reads_back(folder: Path) -> None:
    config = compose(folder, "experiment=big", "weights.a=1")
    data = options.write(config)
    assert data["env"]["_target_"].endswith(".WindyEnv") and "_target_" not in data["algorithm"]
    assert options.read(Run, data) == config
    with pytest.raises(ConfigError, match="unknown key 'extra'"):
        options.read(Run, data | {"extra": 1})


def test_option_texts_come_from_the_docstrings() -> None:
    assert options.option_docs(Algorithm)["learning_rate"] == "step size of the optimiser."
    assert options.option_docs(WindyEnv) == {"image_size": "px", "parallel": "environments.", "wind": "m/s."}


def test_groups_are_the_folders(folder: Path) -> None:
    assert available_groups(folder, Run)["env"] == ["calm", "foreign", "typo", "windy"]
