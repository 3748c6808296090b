"""Models moved along the path between two others, and back."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from tiny import llama, save
from torch import nn

from fused_merge import functional
from fused_merge.interpolation.interpolate import interpolate
from fused_merge.interpolation.ratio_sweep import RatioSweep

RATIOS = [-0.3, 0.0, 0.1, 0.4999, 0.5, 0.9, 1.0, 1.4]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder", "shards"])
def test_a_model_goes_there_and_back(kind, tmp_path):
    base, tuned, model = llama(0), llama(1), llama(2)
    if kind in ("module", "state dict"):
        ends = (base, tuned) if kind == "module" else (base.state_dict(), tuned.state_dict())
    else:
        shard = "4KB" if kind == "shards" else "5GB"
        ends = save(base, tmp_path / "base", shard), str(save(tuned, tmp_path / "tuned"))
        ends = [f"{end}/model.safetensors" for end in ends] if kind == "file" else ends
    points = interpolate(base.state_dict(), tuned.state_dict(), RATIOS)
    sweep = RatioSweep(model, *ends)
    before, pointers = state(model), [parameter.data_ptr() for parameter in model.parameters()]
    for ratio, point in zip(RATIOS, points, strict=True):
        with sweep.at(ratio) as same:
            assert same is model
            assert_state(model, point)
        assert_state(model, before)
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("found", [0, 1, 2])
def test_weights_come_back_after_an_exception(found):
    """Those of the base, of the tuned model, and of neither."""
    model, before = llama(found), llama(found).state_dict()
    with pytest.raises(KeyError), RatioSweep(model, llama(0), llama(1)).at(0.5):
        raise KeyError("in the middle of an evaluation")
    assert_state(model, before)


def test_weights_come_back_if_writing_fails_half_way(monkeypatch):
    model = llama(2)
    sweep, before, write = RatioSweep(model, llama(0), llama(1)), state(model), functional.interpolate
    written = []

    def fail_at_the_fifth(*arguments, **options):
        written.append(write(*arguments, **options))
        if len(written) == 5:
            raise OSError("the disk went away")

    monkeypatch.setattr(functional, "interpolate", fail_at_the_fifth)
    with pytest.raises(OSError, match="the disk went away"), sweep.at(0.5):
        pytest.fail("the block must not run")
    assert_state(model, before)


def test_special_bits_come_back():
    """The sign of a zero too, where `base` has the other zero."""
    model, base, tuned = (nn.Linear(3, 1, bias=False) for _ in range(3))
    nn.init.constant_(base.weight, 0.0)
    for patterns in ([-(2**31), 0x7FC00123, 0x7F800001], [-(2**31)] * 3):
        with torch.no_grad():
            model.weight.view(-1).view(torch.int32).copy_(torch.tensor(patterns))
        before = state(model)
        with RatioSweep(model, base, tuned).at(0.5):
            assert not model.weight.isnan().any()
        assert_state(model, before)


def test_buffers_integers_and_strides():
    def network(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        network[0].weight = nn.Parameter(network[0].weight.detach().T)
        network[1].running_mean.normal_()
        network[1].num_batches_tracked.fill_(seed)
        return network

    base, tuned, model = network(1), network(2), network(3)
    before, sweep = state(model), RatioSweep(model, base, tuned.state_dict())
    with sweep.at(0.5):
        assert model[1].num_batches_tracked.item() == 2
        torch.testing.assert_close(model[1].running_mean, (base[1].running_mean + tuned[1].running_mean) / 2)
        torch.testing.assert_close(model[0].weight, (base[0].weight + tuned[0].weight) / 2)
        assert model[0].weight.stride() == (1, 4)
    with sweep.at(0.0):
        assert_state(model, base.state_dict())
    assert_state(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_model_of_another_dtype_gets_points_rounded_once(dtype, transposed):
    def linear(dtype):
        layer = nn.Linear(50, 70).to(dtype)
        layer.register_buffer("count", torch.tensor(3))
        if transposed:
            layer.weight = nn.Parameter(layer.weight.detach().T)
        return layer

    stored = torch.bfloat16 if dtype == torch.float64 else torch.float32
    base, tuned, model = linear(stored), linear(stored), linear(dtype)
    points = interpolate(*({n: t.float() for n, t in m.named_parameters()} for m in (base, tuned)), RATIOS)
    before, sweep = state(model), RatioSweep(model, base, tuned)
    with sweep.at(0.0):
        for ratio, point in zip(RATIOS, points, strict=True):
            sweep.move_to(ratio)
            for name, parameter in model.named_parameters():
                assert same_bits(parameter.detach(), point[name].to(dtype))
    assert_state(model, before)


def test_integers_of_another_dtype_are_refused():
    model, base, tuned = (nn.Linear(1, 1) for _ in range(3))
    for module, dtype in ((model, torch.int32), (base, torch.int64), (tuned, torch.int64)):
        module.register_buffer("count", torch.tensor([300], dtype=dtype))
    with pytest.raises(ValueError, match=r"'count' is torch.int32 in the model and torch.int64 in base .*one dtype"):
        RatioSweep(model, base, tuned)


def test_a_tied_model_and_a_checkpoint_that_writes_both_out():
    base, tuned, model = llama(0), llama(1), llama(2)
    before, (point,) = state(model), interpolate(base.state_dict(), tuned.state_dict(), [0.3])
    for end in (tuned, state(tuned)):
        with RatioSweep(model, state(base), end).at(0.3):
            assert_state(model, point)
    assert_state(model, before)
    written = state(base)
    written["lm_head.weight"] += 1
    message = r"the model ties 'lm_head.weight' to 'model.embed_tokens.weight', but base .* other values for it; untie"
    with pytest.raises(ValueError, match=message):
        RatioSweep(model, written, state(tuned))


def test_an_untied_model_and_tied_checkpoints():
    base, tuned, model = llama(0), llama(1), llama(2, tied=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    before = state(model)
    with RatioSweep(model, base, tuned).at(1.0):
        assert_state(model, tuned.state_dict())
    assert_state(model, before)


def test_gradients_are_left_alone_and_flow_inside():
    model = llama(2)
    with RatioSweep(model, llama(0), llama(1)).at(0.5):
        model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())


def test_one_point_at_a_time():
    model = llama(2)
    sweep, before = RatioSweep(model, llama(0), llama(1)), state(model)
    with pytest.raises(RuntimeError, match=r"call move_to\(\) inside `with sweep.at\(ratio\):`"):
        sweep.move_to(0.3)
    assert_state(model, before)
    with sweep.at(0.3):
        for ratio in (0.3, 0.6):
            sweep.move_to(ratio)
            message = f"the model is at ratio {ratio} already; leave that block, or use mov"
            with pytest.raises(RuntimeError, match=message):
                sweep.at(0.4).__enter__()
        with pytest.raises(ValueError, match="a ratio must be finite, got inf"):
            sweep.at(float("inf")).__enter__()
    assert_state(model, before)
    with sweep.at(0.4):
        pass


def test_storage_shared_with_an_end():
    model = llama(0)
    message = r"the model shares storage with base \(.*\), which writing to it would change; pass a deep copy"
    for end in (model, model.state_dict()):
        with pytest.raises(ValueError, match=message):
            RatioSweep(model, end, llama(1))
    base = llama(1).state_dict()
    sweep = RatioSweep(model, base, llama(2))
    model.load_state_dict(base, assign=True)
    with pytest.raises(ValueError, match=message):
        sweep.at(0.5).__enter__()


def test_models_that_do_not_fit():
    base, tuned = whole = llama(0), llama(1)
    headless = [{n: t for n, t in m.state_dict().items() if n != "lm_head.weight"} for m in (base, tuned)]
    half = llama(0, dtype=torch.bfloat16)
    for model, ends, message in (
        (llama(2, vocabulary=50), whole, r"model \(module\) and base \(module\) do not .* \[50, 16\] and \[48,"),
        (llama(2), (half, tuned), r"is torch.bfloat16 and torch.float32.*; both must be of one arch.*one dtype"),
        (llama(2, tied=False), headless, r"base \(state dict\) lacks 'lm_head.weight' of model \(module\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RatioSweep(model, *ends)
    with pytest.raises(TypeError, match="tuned must be a module, a state dict or a path, got a NoneType"):
        RatioSweep(llama(2), base, None)
