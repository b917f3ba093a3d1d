"""A name on the hub: what the cache has is read without a connection, what it has not is an error in words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there


@pytest.fixture
def cache(tmp_path: Path, reference: Path) -> Path:
    """A cache of the hub that has the tiny checkpoint as tiny/openvla."""
    repository = tmp_path / "hub" / "models--tiny--openvla"
    shutil.copytree(reference / "checkpoint", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def import_(cache: Path, name: str, network: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["import", f"path={name}", f"out={cache.parent / 'bundle'}", "unnorm_key=bridge_orig"]
    return subprocess.run(
        [sys.executable, "-m", "vla", *command], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_CACHE": str(cache), **network},
    )  # fmt: skip


@pytest.mark.parametrize("network", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_the_cache_has_needs_no_connection(cache: Path, network: dict[str, str]) -> None:
    done = import_(cache, "tiny/openvla", network)
    assert done.returncode == 0, done.stderr
    assert (cache.parent / "bundle" / "model.safetensors").is_file()


@pytest.mark.parametrize("network", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_it_has_not_is_an_error_that_says_what_to_do(cache: Path, network: dict[str, str]) -> None:
    done = import_(cache, "tiny/absent", network)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "HUB at tiny/absent" in done.stderr and "download it elsewhere and name the folder" in done.stderr
    assert not (cache.parent / "bundle").exists()
