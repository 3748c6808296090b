"""Inputs that change, folders that are in the way, finished jobs, and what a plan promises."""

from __future__ import annotations

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from jobs import FILES, NAMES, RATIOS, WORK, contents, flip, leave_unfinished, patched, stop_before_the_name_of
from safetensors.torch import load_file, save_file

from fused_merge.checkpoints import job
from fused_merge.checkpoints.interpolate import interpolate_checkpoints, plan_interpolation

# --- inputs that change


@pytest.mark.parametrize("name", ["base/a.safetensors", "tuned/b.safetensors", "tuned/config.json"])
def test_what_changed_before_a_job_goes_on_is_never_mixed(name, own, tmp_path):
    out, changed = tmp_path / "out", tmp_path / name
    leave_unfinished(own, RATIOS, out)
    if name.endswith("json"):
        changed.write_text('{"other": 1}')
    else:
        save_file({n: tensor + 1 for n, tensor in load_file(changed).items()}, changed, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"or this one with other inputs, left unfinished; run that one again, pass"):
        interpolate_checkpoints(*own, RATIOS, out)
    interpolate_checkpoints(*own, RATIOS, out, overwrite=True)
    interpolate_checkpoints(*own, RATIOS, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")
    assert sorted(os.listdir(out)) == NAMES


@pytest.mark.parametrize("name", ["base/b.safetensors", "tuned/config.json"])
@pytest.mark.parametrize("vanishes", [False, True])
@pytest.mark.parametrize(("at", "finished"), [(FILES[0], 0), (FILES[1], 1)])
def test_inputs_that_change_while_they_are_read(at, finished, vanishes, name, own, tmp_path):
    out = tmp_path / "out"

    def change(original, planned, *arguments):
        if planned.name == at:
            (tmp_path / name).unlink() if vanishes else os.utime(tmp_path / name, (0, 0))
        return original(planned, *arguments)

    with patched(job, "write_file", change), pytest.raises(OSError, match=name) as caught:
        interpolate_checkpoints(*own, RATIOS, out)
    assert re.search("vanished or changed after it was looked at; put it back|No such file", str(caught.value))
    kept = f"; 1 of 2 files are finished and kept in {out / WORK}: once that is mended" in str(caught.value)
    journal = [path.name for path in out.glob(f"{WORK}/journal/*.json")]
    assert (kept, os.listdir(out), journal) == ((True, [WORK], [f"{FILES[0]}.json"]) if finished else (False, [], []))


def test_a_configuration_that_vanishes_before_it_is_copied(own, expected, tmp_path):
    out, config = tmp_path / "out", own[1] / "config.json"
    plan = plan_interpolation(*own, RATIOS, out)
    stop_before_the_name_of(out / NAMES[0], plan.run)
    config.rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"tuned/config\.json vanished or changed .*; 2 of 2 files are finished"):
        plan.run()
    (tmp_path / "away").rename(config)
    plan.run()
    assert contents(out).keys() == expected.keys()


# --- folders that are in the way, and jobs that are done


def test_a_folder_that_came_to_be_in_the_meantime(finish, tmp_path):
    own = tmp_path / NAMES[1] / "own"

    def make(original, *arguments):
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        return original(*arguments)

    with patched(job, "write_file", make), pytest.raises(OSError, match=r"r0\.30 exists; pass overwrite=True .*2 of 2"):
        finish()
    assert own.read_text() == "mine"
    shutil.rmtree(own.parent)
    finish()


def test_a_finished_job_is_done_again_at_once(models, tmp_path):
    made = interpolate_checkpoints(*models, RATIOS, tmp_path)

    def stamps():
        found = {path: path.stat() for path in tmp_path.rglob("*") if path.is_file()}
        return {path: (each.st_ino, each.st_mtime_ns) for path, each in found.items()}

    before = stamps()
    with patched(job, "write_file", lambda *_: 1 / 0):
        for options in ({}, {"verify": True}):
            assert interpolate_checkpoints(*models, RATIOS, tmp_path, **options) == made
    assert stamps() == before
    flip(made[1] / FILES[1], 5000)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    with pytest.raises(ValueError, match=r"r0\.30/b\.safetensors is not what was written, .*; write the folder again"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True, overwrite=True)


def test_a_finished_job_needs_neither_room_nor_leave_to_write_nor_what_another_left(models, tmp_path, monkeypatch):
    made = interpolate_checkpoints(*models, RATIOS, tmp_path)
    leave_unfinished(models, [0.7], tmp_path)
    kept = contents(tmp_path / WORK)
    assert interpolate_checkpoints(*models, RATIOS, tmp_path) == made
    assert contents(tmp_path / WORK) == kept
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True) == made
    with pytest.raises(OSError, match=r"is not a folder that you may write to"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, overwrite=True)


# --- plans


def test_a_plan_writes_nothing_and_says_what_will_be_written(models, tmp_path):
    out = tmp_path / "new" / "out"
    plan = plan_interpolation(*models, RATIOS, out)
    described = plan.describe()
    assert os.listdir(tmp_path) == []
    assert plan.run() == [out / name for name in NAMES]
    assert described["outputs"] == [str(out / name) for name in NAMES]
    sizes = {str(path): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    weights = {path: size for path, size in sizes.items() if path.endswith(".safetensors")}
    assert {each["path"]: each["bytes"] for each in described["files"]} == weights
    left = ("README.md", "fused_merge.json")
    assert described["bytes_written"] == sum(size for path, size in sizes.items() if not path.endswith(left))
    assert described["tensors"] == 8


def test_what_a_killed_run_holds_counts_as_room(models, tmp_path, monkeypatch):
    leave_unfinished(models, RATIOS, tmp_path)
    needed = plan_interpolation(*models, RATIOS, tmp_path / "other").bytes_written
    part = tmp_path / WORK / "outputs" / NAMES[0] / f"{FILES[1]}.part"
    part.write_bytes(bytes(10_000))
    held = sum(path.stat().st_size for path in (tmp_path / WORK).rglob("*") if path.is_file())
    free = SimpleNamespace(free=needed - held)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    plan_interpolation(*models, RATIOS, tmp_path)
    free.free -= 1
    with pytest.raises(OSError, match=r" GB of .* GB free; make room or write less at once"):
        plan_interpolation(*models, RATIOS, tmp_path)


@pytest.mark.parametrize("weight_map", [{"b": "x", "a": "y"}, {'a"\n': "é"}])
def test_an_index_is_json_to_read(weight_map):
    # What an index from outside may hold beside its map.
    content = {"metadata": {"total_size": 3}, "zz": {"weight_map": {}}}
    whole = json.dumps({**content, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    assert job._index_text(content, weight_map) == whole
