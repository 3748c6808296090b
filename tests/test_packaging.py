"""What a wheel holds: the kernels under fused_merge, and no top-level package `kernels`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_ships_the_kernels_inside_the_package(tmp_path):
    # A copy: a build folder left in the checkout would be packed again, stale files and all.
    tree = tmp_path / "tree"
    for item in ("pyproject.toml", "README.md", "LICENSE", "fused_merge", "kernels"):
        source, copy = ROOT / item, tree / item
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    run = subprocess.run([*build, "--wheel-dir", tmp_path, tree], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = [file.parent.relative_to(ROOT) for file in ROOT.glob("fused_merge/**/__init__.py")]
    for folder, package in (("kernels", "fused_merge/kernels"), *((room, room.as_posix()) for room in rooms)):
        for source in (ROOT / folder).glob("*.py"):
            assert f"{package}/{source.name}" in names
    assert "fused_merge/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fused_merge"}
