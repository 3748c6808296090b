from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from device import DEVICE

from fused_merge.functional import backend

CPU = torch.device("cpu")


def python(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_MERGE_IMPL")}
    run = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_auto_is_eager_on_a_cpu_and_triton_on_a_gpu():
    assert backend.resolve("auto", CPU) == "eager"
    if DEVICE.type == "cuda":
        assert backend.resolve("auto", DEVICE) == "triton"


def test_auto_compiles_on_a_cpu_from_a_million_elements_on(monkeypatch, caplog):
    assert backend.resolve("auto", CPU, 999_999) == "eager"
    assert backend.resolve("auto", CPU, 1_000_000) == "compiled"
    monkeypatch.setitem(sys.modules, "numba", None)
    backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fused_merge"):
        assert backend.resolve("auto", CPU, 1_000_000) == "eager"
        assert backend.resolve("auto", CPU, 1_000_000) == "eager"
    missing = "numba is not installed; install fused_merge[cpu], or use impl='eager'"
    assert [record.getMessage() for record in caplog.records] == [f"fused_merge runs eager code on cpu: {missing}"]
    with pytest.raises(RuntimeError, match=re.escape(f"impl='compiled' cannot run on cpu: {missing}")):
        backend.resolve("compiled", CPU)


def test_a_numba_that_cannot_be_imported_says_why(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.0 or less. Got NumPy 2.9.')")
    code = """
import torch
from fused_merge.functional import backend
print(backend.why_not_compiled(torch.device("cpu")))
"""
    assert python(code, PYTHONPATH=str(tmp_path)) == (
        "numba cannot be imported (Numba needs NumPy 2.0 or less. Got NumPy 2.9.); install fused_merge[cpu], or use "
        "impl='eager'"
    )


def test_what_processes_hold_of_a_tensor_does_not_choose_the_backend(monkeypatch):
    """It counts what a tensor is in whole, and one device after the other."""
    monkeypatch.setattr(backend, "PER_TENSOR", 0)
    parts, wholes = [torch.zeros(10), torch.zeros(0), torch.zeros(3)], [999_990, 10, 0]
    assert backend.choose("auto", parts, wholes) == {CPU: "compiled"}
    assert backend.choose("auto", parts, [999_990, 9, 0]) == {CPU: "eager"}
    monkeypatch.setattr(backend, "PER_TENSOR", 333_333)
    assert backend.choose("auto", parts, [0, 0, 0]) == {CPU: "eager"}
    assert backend.choose("auto", parts, [0, 0, 1]) == {CPU: "compiled"}
    # What does not run again and again is not compiled.
    assert backend.choose("auto", [torch.zeros(1_000_000)]) == {CPU: "eager"}


def test_what_is_asked_for_by_name():
    for impl, device in (("compiled", CPU), ("eager", DEVICE), ("triton", DEVICE)):
        assert backend.resolve(impl, device) == impl
    with pytest.raises(RuntimeError, match="impl='compiled' cannot run on meta: it is for the CPU"):
        backend.resolve("compiled", torch.device("meta"))
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'compiled', 'eager', got 'cuda'"):
        backend.resolve("cuda", CPU)


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("FUSED_MERGE_IMPL", "triton")
    assert backend.resolve("eager", DEVICE) == "triton"
    monkeypatch.setenv("FUSED_MERGE_IMPL", "fast")
    with pytest.raises(ValueError, match="FUSED_MERGE_IMPL must be one of"):
        backend.resolve("eager", CPU)


def test_without_triton_the_reason_is_its_absence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.why_not_triton(CPU).startswith("Triton is not installed; install a torch build that brings it")


def test_importing_imports_neither_triton_nor_extras_and_triton_that_cannot_run_says_why():
    code = """
import sys
import fused_merge
print("torch" in sys.modules)
import torch
before = set(sys.modules)
fused_merge.OnDAREAdamW
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "numba", "rich", "typer", "transformers"}))
from fused_merge.functional import backend
try:
    backend.resolve("triton", torch.device("cpu"))
except RuntimeError as error:
    print(error)
"""
    already, extras, sentence = python(code).split("\n", 2)
    assert (already, extras) == ("False", "[]")
    assert sentence.startswith("impl='triton' cannot run on cpu: Triton drives no cpu device; use impl='eager'")
    assert "TRITON_INTERPRET=1" in sentence


def test_it_works_without_numba():
    code = """
import sys, logging
sys.modules["numba"] = None
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import torch, fused_merge as fm
model, base = torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000)
delta = fm.ReferenceDelta.from_models(base, model)
optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-3, alpha=0.1)
before = model.weight.clone()
for _ in range(2):
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
print(not torch.equal(before, model.weight))
"""
    assert python(code).splitlines() == [
        "fused_merge runs eager code on cpu: numba is not installed; install fused_merge[cpu], or use impl='eager'",
        "True",
    ]


def test_it_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch, fused_merge as fm
model, base = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
delta = fm.ReferenceDelta.from_models(base, model)
optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-3)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
print(fm.interpolate(torch.zeros(2), torch.ones(2), [0.5]).tolist())
"""
    assert python(code) == "[[0.5, 0.5]]"
