"""Steps of everyone against torch's fused AdamW, on a CPU: a part of `make bench`."""

from __future__ import annotations

import pytest
from paired import pair_up, row_of
from step_cases import CONTENDERS, FUSED, LISTS, tensors_of

PAIRS = [(case, provider) for case in LISTS for provider, contender in CONTENDERS.items() if case in contender.cases]


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.benchmark(group="step")
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated")
def bench_step(benchmark, case, provider):
    tensors, contender = tensors_of(case), CONTENDERS[provider]
    step, fused = contender.make(tensors), tensors.fused

    def steps(run):
        for _ in range(contender.steps):
            run()

    turns = pair_up(benchmark, lambda: steps(step), lambda: steps(fused), tensors.refresh)
    benchmark.extra_info.update(
        row_of(
            turns,
            provider=provider,
            case=case,
            dtype=str(contender.dtype).removeprefix("torch."),
            parameters=tensors.numel,
            bytes_per_parameter=contender.bytes,
            baseline=FUSED,
            target=contender.target_of(case),
            repeats=contender.steps,
        )._asdict()
    )
