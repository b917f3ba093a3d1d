"""Configurations: YAML files composed by Hydra, command-line overrides, a dataclass that checks the result.

`configs/NAME.yaml` is the primary configuration of a command. Its defaults list picks one file of each group
(`configs/env/`, `model/`, `algorithm/`, `placement/`, ...); `experiment/FILE.yaml` is laid over everything:

    # configs/train.yaml                    # configs/experiment/tabletop_ppo.yaml
    defaults:                               # @package _global_
      - env: tabletop                       defaults:
      - algorithm: ppo                        - override /placement: pipelined
      - placement: colocated                algorithm:
      - _self_                                learning_rate: 1.0e-4
      - experiment: null
    seed: 0

Keys that no YAML file mentions take the defaults of the dataclass. A group's file names its dataclass with
`_target_: package.module.Class` where the field is declared as a base class (see `vla.options`). A file of one's own
takes a group's place by its path: `model=own_model.yaml`, `experiment=own_experiment.yaml`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vla import options
from vla.errors import ConfigError

T = TypeVar("T")


def config_folder() -> Path:
    """The folder of the YAML files: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no configuration files in {package} or beside it: reinstall simreal", code="CONFIG")


def load(
    schema: type[T], config_name: str | None = None, overrides: Sequence[str] = (), folder: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> T:  # fmt: skip
    """The configuration of a command, checked: an instance of the dataclass `schema`.

    config_name: name of the primary YAML file, None for a command that has only its dataclass.
    overrides: `key=value` for a value, `group=file` for a file of a group, `group=path.yaml` for one's own.
    folder: where the YAML files are, by default those of the project.
    base: options that stand in the place of what the YAML files say, but for the groups that are chosen.
    """
    return options.read(schema, compose_data(schema, config_name, overrides, folder, base))


def compose_data(
    schema: type, config_name: str | None = None, overrides: Sequence[str] = (), folder: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Plain data: the YAML files chosen, defaults of `schema`, overrides; types are not checked yet."""
    folder = folder or config_folder()
    parsed = [_parse(text) for text in overrides]
    groups = available_groups(folder, schema) if config_name else {}
    choices = [(key, value) for key, value in parsed if key in groups and not isinstance(value, dict)]
    values = [item for item in parsed if item not in choices]
    own = {key: Path(value) for key, value in choices if str(value).endswith(".yaml")}
    choices = [(key, value) for key, value in choices if key not in own]
    for group, choice in choices:
        if choice is not None and str(choice) not in groups[group]:
            hint = options.nearest(str(choice), groups[group])
            raise ConfigError(f"{group}={choice}: no such file in {folder / group}; {hint}", code="CONFIG")
    chosen = {group for group, _ in choices} | {*own}
    experiment = own.pop("experiment", None)
    named = dict(choices).get("experiment")
    if experiment or named is not None:
        foreign = _foreign(experiment or folder / f"experiment/{named}.yaml", schema)
        if foreign:
            told = f"experiment={experiment or named} is for another command: it sets {', '.join(foreign)}"
            raise ConfigError(told, code="CONFIG")
    composed = _compose_files(folder, config_name, choices, experiment) if config_name else {}
    composed.update({group: _own_file(file) for group, file in own.items()})
    if base is not None:
        if "experiment" in chosen:
            raise ConfigError("experiment= lays options over those of from=: give one of the two", code="CONFIG")
        composed = {k: v for k, v in base.items() if k not in chosen} | {k: composed[k] for k in chosen & {*composed}}
    try:
        config = OmegaConf.create(options.fill(schema, composed))
        for key, value in values:
            _set(config, schema, key, value)
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{config_name or 'configuration'}: {error}", code="CONFIG") from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def available_groups(folder: Path, schema: type) -> dict[str, list[str]]:
    """Group name -> the files that may be chosen for it, of the groups that a command with this `schema` has."""
    used = {"experiment", *options.fill(schema, {})}
    groups: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/**/*.yaml")):
        group, option = file.relative_to(folder).with_suffix("").as_posix().split("/", 1)
        if group in used:
            groups.setdefault(group, []).append(option)
    return groups


def experiments(folder: Path, schema: type) -> list[str]:
    """The experiments that set nothing but what a command with this `schema` has."""
    found = available_groups(folder, schema).get("experiment", [])
    return [name for name in found if not _foreign(folder / f"experiment/{name}.yaml", schema)]


def _foreign(experiment: Path, schema: type) -> list[str]:
    """What an experiment sets that `schema` doesn't have."""
    told = _own_file(experiment)
    return sorted({*map(str, told)} - {"defaults", *options.fill(schema, {})}) if isinstance(told, dict) else []


def _parse(text: str) -> tuple[str, Any]:
    """`key=value` -> key and value, read by Hydra's grammar, or taken as a string where that fails."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"'{text}' is not an option: write key=value, for example seed=1", code="CONFIG")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return key, value
    if override.is_sweep_override():
        raise ConfigError(f"'{text}': one value at a time; for a list write {key}=[{value}]", code="CONFIG")
    return key, override.value()


def _compose_files(
    folder: Path, config_name: str, choices: Sequence[tuple[str, Any]], experiment: Path | None
) -> dict[str, Any]:
    if not (folder / f"{config_name}.yaml").is_file():
        raise ConfigError(f"no configs/{config_name}.yaml in {folder}: reinstall simreal", code="CONFIG")
    lines = [f"~{group}" if choice is None else f"{group}={choice}" for group, choice in choices]
    try:
        with tempfile.TemporaryDirectory() as beside, initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            if experiment:  # in a folder of its own, which Hydra searches after the others
                Path(beside, "experiment").mkdir()
                Path(beside, "experiment/own.yaml").write_text(f"# @package _global_\n{experiment.read_text('utf-8')}")
                lines += [f"hydra.searchpath=[file://{beside}]", "experiment=own"]
            composed = OmegaConf.to_container(compose(config_name, overrides=lines), resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"configs/{config_name}.yaml: {error}", code="CONFIG") from error
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _own_file(file: Path) -> Any:
    """The data of a YAML file outside of the folder."""
    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # of the file, or whatever the YAML parser raises
        raise ConfigError(f"{file} can't be read: {error}", code="CONFIG") from error


def _set(config: Any, schema: type, key: str, value: Any) -> None:
    """Set a declared key; an undeclared one is refused with the nearest valid name."""
    data: Any = OmegaConf.to_container(config, resolve=False)
    listed = {option.key: option.default for option in options.listing(schema, data)}
    names_component = isinstance(value, dict) and any(name.startswith(f"{key}.") for name in listed)
    mappings = [name for name, item in listed.items() if isinstance(item, dict)]
    inside_mapping = any(key.startswith(f"{name}.") for name in mappings)
    if not (key in listed or names_component or inside_mapping):
        also = options.aliases(schema).get(key.partition(".")[0])
        hint = f"the option is {also}" if also else options.nearest(key, list(listed))
        raise ConfigError(f"unknown key '{key}': {hint}", code="CONFIG")
    OmegaConf.update(config, key, value)
