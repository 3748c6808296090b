"""Models that differ in what they hold, through every command: what belongs together is the same everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits
from folders import load
from pairs import Models, linear, path_of
from safetensors.torch import save_file
from tiny import llama, save
from transformers import LlamaForCausalLM

import fused_merge as fm

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FREQUENCIES, MTP = "model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.0.weight"


@pytest.fixture
def models(tmp_path) -> Callable[..., Models]:
    """Write two models, with what else their files hold."""

    def models(base, tuned, *, base_holds=None, tuned_holds=None):
        folders = []
        for name, model, more in (("base", base, base_holds), ("tuned", tuned, tuned_holds)):
            folder = save(model.eval(), tmp_path / name)
            if more:
                save_file({**load(folder), **more}, folder / "model.safetensors", {"format": "pt"})
            folders.append(folder)
        return Models(base, tuned, tuple(folders))

    return models


def logits(model):
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits


def written(folder):
    """A folder as Transformers loads it."""
    return LlamaForCausalLM.from_pretrained(folder).eval()


def refused(models, out, message, *, delta: bool = True):
    """Every command refuses the two with one sentence."""
    base, tuned = models.folders
    calls = [
        lambda: fm.interpolate_checkpoints(base, tuned, [0.5], out / "line"),
        lambda: fm.merge_checkpoints(base, {tuned: 0.5}, "task_arithmetic", out / "merged"),
        lambda: fm.interpolate(*models.held, [0.5]),
    ]
    if delta:
        calls += [
            lambda: fm.ReferenceDelta.from_checkpoints(base, tuned),
            lambda: fm.RatioSweep(models.tuned, base, tuned),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


# --- embeddings that one model ties


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_a_model_that_ties_its_head_and_one_that_does_not(tied, models, run, tmp_path):
    made = models(llama(0, tied=tied == "base"), llama(1, tied=tied == "tuned"))
    ends = [{HEAD: held[EMBED], **held} for held in made.held]
    points = fm.interpolate(*ends, [0.4])[0]

    folders = path_of(made, run, tmp_path / "line")
    for folder, model in ((folders[0], made.base), (folders[2], made.tuned)):
        assert_same_bits(logits(written(folder)), logits(model))
    assert_same_bits(load(folders[1]), points)
    assert not written(folders[1]).config.tie_word_embeddings
    assert_same_bits(written(folders[1]).lm_head.weight.detach(), points[HEAD])
    assert_same_bits(linear(made, tmp_path)[HEAD], 0.5 * ends[0][HEAD] + 0.5 * ends[1][HEAD])

    untied = made.tuned if tied == "base" else made.base
    sweep = fm.RatioSweep(llama(2, tied=False), *made.folders)
    for ratio, model in ((0.0, made.base), (1.0, made.tuned)):
        with sweep.at(ratio) as moved:
            assert_same_bits(logits(moved.eval()), logits(model))
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders)
    assert_same_bits(delta.tensor(HEAD), ends[1][HEAD] - ends[0][HEAD])
    fm.OnDAREAdamW(untied.named_parameters(), reference_delta=delta).bind()
    with pytest.raises(ValueError, match=f"the model ties '{HEAD}' to '{EMBED}', but .* holds other values for it"):
        fm.RatioSweep(llama(2, tied=True), *made.folders)


# --- another vocabulary


@pytest.mark.parametrize("sizes", [(48, 50), (50, 48)])
def test_two_chat_tokens(sizes, models, run, tmp_path):
    made = models(*(llama(i, vocabulary=size, tied=False) for i, size in enumerate(sizes)))
    refused(made, tmp_path, r"'lm_head.weight' is .*; pass align_vocabulary=True, or resize")

    base, tuned = made.held
    common = {name: slice(0, 48) if name in (EMBED, HEAD) else ... for name in base}
    points = fm.interpolate(*({name: x[common[name]] for name, x in held.items()} for held in (base, tuned)), [0.4])[0]
    expected = {name: torch.cat([x, tuned[name][48:]]) if name in (EMBED, HEAD) else x for name, x in points.items()}
    folders = path_of(made, run, tmp_path / "line", "--align-vocabulary")
    assert_same_bits(load(folders[1]), expected)
    assert_same_bits(fm.interpolate(base, tuned, [0.4], align_vocabulary=True)[0], expected)
    assert_same_bits(logits(written(folders[2])), logits(made.tuned))
    assert_same_bits(logits(written(folders[0]))[..., :48], logits(made.base)[..., :48])

    moved = llama(2, vocabulary=sizes[1], tied=False)
    with fm.RatioSweep(moved, *made.folders, align_vocabulary=True).at(0.4):
        assert_same_bits({name: x.detach() for name, x in moved.named_parameters()}, {n: expected[n] for n in expected})
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders, align_vocabulary=True)
    assert delta.shape(EMBED) == (48, 16)
    assert_same_bits(delta.tensor(HEAD), tuned[HEAD][:48] - base[HEAD][:48])


@pytest.mark.parametrize(
    "merging",
    [{}, {"merge_every": 2}, {"dtype": torch.bfloat16, "master": "fp32"}, {"impl": "triton", "stats_every": 1}],
)
@pytest.mark.parametrize("method", ["ondare", "onties", "onproj"])
def test_rows_that_tau_lacks_step_plainly(method, merging, models, caplog):
    made = models(llama(0, tied=False), llama(1, tied=False, vocabulary=50))
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders, align_vocabulary=True)
    options = {"lr": 1e-2, "alpha": 0.1, "method": method} | ({} if method == "onproj" else {"reserve_rate": 0.5})
    dtype = merging.get("dtype", torch.float32)
    options |= {name: value for name, value in merging.items() if name != "dtype"}
    whole = torch.randn(50, 16).to(dtype)
    grads = [torch.randn(50, 16).to(dtype) for _ in range(3)]

    def train(parameters, missing="error", **more):
        optimizer = fm.MergingAdamW(parameters.items(), reference_delta=delta, missing=missing, **{**options, **more})
        for grad in grads:
            for name, parameter in parameters.items():
                parameter.grad = grad[: len(parameter)] if name == EMBED else grad[48:]
            optimizer.step()
        return optimizer

    together = {EMBED: torch.nn.Parameter(whole.clone())}
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' has shape \(50, 16\) .* missing='plain'"):
        train(together)
    with caplog.at_level("WARNING"):
        optimizer = train(together, missing="plain")
    assert "rows 48 to 49 of model.embed_tokens.weight" in caplog.text
    cut = {EMBED: torch.nn.Parameter(whole[:48].clone()), "new": torch.nn.Parameter(whole[48:].clone())}
    apart = train(cut, missing="plain")
    assert_same_bits(together[EMBED].detach(), torch.cat([cut[EMBED], cut["new"]]).detach())
    for key, state in optimizer.state[together[EMBED]].items():
        parts = [apart.state[parameter].get(key) for parameter in cut.values()]
        if state.ndim == 2 and None not in parts:
            assert_same_bits(state, torch.cat(parts))
        elif state.ndim == 0:
            assert_same_bits(state, parts[0])


# --- tensors that one model lost or won


def test_frequencies_that_old_files_hold(models, run, tmp_path):
    """A buffer that is made anew: no model has it, and no delta."""
    made = models(llama(0), llama(1), base_holds={FREQUENCIES: torch.ones(4)})
    whole = fm.ReferenceDelta.from_models(made.base, made.tuned)
    assert fm.ReferenceDelta.from_checkpoints(*made.folders).identity == whole.identity
    refused(made, tmp_path, f"tuned.* lacks '{FREQUENCIES}' of", delta=False)
    with fm.RatioSweep(llama(2), *made.folders).at(1.0) as moved:
        assert_same_bits(moved.state_dict(), made.tuned.state_dict())
    for unmatched in ("copy", "drop"):
        folders = path_of(made, run, tmp_path / unmatched, "--unmatched", unmatched)
        for folder, model in ((folders[0], made.base), (folders[2], made.tuned)):
            assert (FREQUENCIES in load(folder)) == (unmatched == "copy")
            assert_same_bits(logits(written(folder)), logits(model))


def test_layers_of_multi_token_prediction_that_tuning_lost(models, run, tmp_path):
    lost = torch.randn(8, 8)
    made = models(llama(0), llama(1), base_holds={MTP: lost})
    refused(made, tmp_path, rf"tuned lacks '{MTP}' of .*base; both must hold the same|tuned .* lacks '{MTP}'")
    for unmatched in ("copy", "drop"):
        folders = path_of(made, run, tmp_path / unmatched, "--unmatched", unmatched)
        for folder, end in zip(folders[::2], made.held, strict=True):
            found = load(folder)
            assert found.pop(MTP, None) is None if unmatched == "drop" else torch.equal(found.pop(MTP), lost)
            end.pop(MTP, None)
            assert_same_bits(found, end)
        assert (MTP in linear(made, tmp_path / unmatched, unmatched=unmatched)) == (unmatched == "copy")
    points = fm.interpolate(*made.held, [0.0, 0.5], unmatched="copy")
    assert all(torch.equal(point[MTP], lost) for point in points)
    assert MTP not in fm.interpolate(*made.held, [0.5], unmatched="drop")[0]
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders, unmatched="ignore")
    assert MTP not in delta.names
    assert_same_bits(delta.tensor(NORM), made.held[1][NORM] - made.held[0][NORM])
    for unmatched in ("copy", "ignore"):
        with fm.RatioSweep(llama(2), *made.folders, unmatched=unmatched).at(0.0) as moved:
            assert_same_bits(logits(moved.eval()), logits(made.base))


def test_a_tensor_of_the_model_that_one_end_lacks(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 2)})
    base, tuned = ({name: torch.randn(x.shape) for name, x in model.state_dict().items()} for _ in range(2))
    del base["head.weight"], base["head.bias"]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"base \(state dict\) lacks 'head.weight', 'head.bias' of tuned"):
        fm.RatioSweep(model, base, tuned)
    for unmatched, held in (("copy", tuned), ("ignore", before)):
        sweep = fm.RatioSweep(model, base, tuned, unmatched=unmatched)
        assert sweep.names == ("a.weight", "a.bias")
        for ratio in (0.0, 0.3, 1.0):
            with sweep.at(ratio):
                assert_same_bits(model.state_dict()["head.weight"], held["head.weight"])
                point = fm.interpolate(base["a.weight"], tuned["a.weight"], [ratio])[0]
                assert_same_bits(model.state_dict()["a.weight"], point)
        assert_same_bits(model.state_dict(), before)


def test_an_upscaled_model_has_layers_of_its_own(models, run, tmp_path):
    base = llama(0)
    third = {
        name.replace("layers.1.", "layers.2."): x.detach().clone()
        for name, x in base.named_parameters()
        if ".1." in name
    }
    made = models(base, llama(0), tuned_holds=third)
    refused(made, tmp_path, "base.* lacks 'model.layers.2.", delta=False)
    folders = path_of(made, run, tmp_path / "line", "--unmatched", "copy")
    assert third.keys() <= load(folders[0]).keys()


def test_models_with_little_in_common(models, run, tmp_path):
    made = models(llama(0), llama(1), tuned_holds={"tower.weight": torch.randn(99, 99)})
    for unmatched in ("error", "copy", "drop"):
        code, _, errors = run(
            "interpolate",
            *map(str, made.folders),
            "--ratios",
            "0.5",
            "--out",
            str(tmp_path / "x"),
            "--unmatched",
            unmatched,
        )
        assert code == 1
        assert "of the bytes of" in errors
        assert "two models of one architecture are needed" in errors
    with pytest.raises(ValueError, match="two models of one architecture are needed"):
        fm.ReferenceDelta.from_checkpoints(*made.folders, unmatched="ignore")


# --- other names


def test_a_wrapped_model(models, run, tmp_path):
    made = models(llama(0), llama(1))
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    save_file({f"net.{name}": x for name, x in made.held[1].items()}, wrapped / "model.safetensors")
    for base, tuned in ((made.folders[0], wrapped), (wrapped, made.folders[0])):
        with pytest.raises(ValueError, match=r"would match with strip_prefix='net\.'; check the paths"):
            fm.interpolate_checkpoints(base, tuned, [0.5], tmp_path / "refused")
    made = made._replace(folders=(made.folders[0], wrapped))
    assert_same_bits(
        load(path_of(made, run, tmp_path / "line", "--strip-prefix", "net.")[2]), load(save(made.tuned, tmp_path / "t"))
    )
    renamed = path_of(made, run, tmp_path / "renamed", "--rename", r"^net\.=")
    assert_same_bits(load(renamed[2]), load(tmp_path / "t"))
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders, strip_prefix="net.")
    assert delta.identity == fm.ReferenceDelta.from_models(made.base, made.tuned).identity
    with fm.RatioSweep(llama(2), *made.folders, strip_prefix="net.").at(1.0) as moved:
        assert_same_bits(moved.state_dict(), made.tuned.state_dict())


def test_an_optimizer_says_which_prefix_is_in_the_way(models):
    made = models(llama(0), llama(1))
    delta = fm.ReferenceDelta.from_checkpoints(*made.folders)
    wrapped = {f"net.{name}": parameter for name, parameter in made.tuned.named_parameters()}
    with pytest.raises(
        ValueError, match=r"they are 'net.model.embed_tokens.weight' and .*; pass \(name.removeprefix\('net.'\), par"
    ):
        fm.OnDAREAdamW(wrapped.items(), reference_delta=delta).bind()
    short = {name.removeprefix("model."): parameter for name, parameter in made.tuned.named_parameters()}
    with pytest.raises(ValueError, match=r"; make it with strip_prefix='model\.', or make the delta of the model"):
        fm.OnDAREAdamW(short.items(), reference_delta=delta).bind()
    stripped = fm.ReferenceDelta.from_checkpoints(*made.folders, strip_prefix="model.")
    fm.OnDAREAdamW(short.items(), reference_delta=stripped).bind()


def test_inspect_shows_the_pairing(models, run):
    made = models(llama(0), llama(1, tied=False), base_holds={MTP: torch.ones(2)})
    code, printed, _ = run("inspect", *map(str, made.folders), "--pairing", "--unmatched", "ignore")
    assert code == 0
    rows = [line.split() for line in printed.splitlines()]
    assert ["untied", "1", "3.1", "kB", EMBED, "with", HEAD] in rows
    assert ["first", "only", "1", "8", "bytes", MTP] in rows
    code, printed, _ = run("inspect", *map(str, made.folders), "--pairing", "--json")
    document = json.loads(printed)
    assert (code, document["refused"]) == (0, [document["refused"][0]])
    assert f"lacks '{MTP}' of" in document["refused"][0]
    assert run("inspect", str(made.folders[0]), "--pairing")[0] == 2


# --- what cannot be combined


def quantized(folder):
    """Give a folder what GPTQ makes of a projection: codes, scales and zeros."""
    held = load(folder)
    name = "model.layers.0.mlp.up_proj"
    del held[f"{name}.weight"]
    held |= {f"{name}.qweight": torch.ones(2, 24, dtype=torch.int32), f"{name}.scales": torch.ones(1, 24)}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return r"tuned is quantized: 'model.layers.0.mlp.up_proj.qweight' is torch.int32, with .*; dequantize it first"


def with_adapter(folder):
    held = load(folder)
    held |= {f"model.layers.0.mlp.up_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return r"tuned holds factors of an adapter, such as 'model.*up_proj.lora_A.weight'.* merge it into its base"


def another_architecture(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForTokenClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    return r"base is a LlamaForCausalLM and .*tuned a LlamaForTokenClassification; take models of one architecture"


@pytest.mark.parametrize("spoil", [quantized, with_adapter, another_architecture])
def test_models_that_no_command_combines(spoil, models, run, tmp_path):
    made = models(llama(0), llama(1))
    base, tuned = map(str, made.folders)
    message = spoil(made.folders[1])
    calls = [
        lambda: fm.interpolate_checkpoints(base, tuned, [0.5], tmp_path / "x"),
        lambda: fm.merge_checkpoints(base, {tuned: 0.5}, "ties", tmp_path / "x"),
        lambda: fm.ReferenceDelta.from_checkpoints(base, tuned),
        lambda: fm.ReferenceDelta.from_models(base, tuned),
        lambda: fm.RatioSweep(llama(2), base, tuned),
        lambda: fm.adapt_ratios(llama(2), base, tuned, lambda model, batch: 0.0, [None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    (tmp_path / "scores.py").write_text("def one(model):\n    return 1.0\n")
    (tmp_path / "prompts.txt").write_text("a\n")
    out = ["--out", str(tmp_path / "x")]
    commands = [
        ["interpolate", base, tuned, "--ratios", "0.5", *out],
        ["merge", "--base", base, "--model", f"{tuned}=1", "--method", "ties", *out],
        ["delta", base, tuned, *out],
        ["inspect", base, tuned],
    ]
    if spoil is not another_architecture:
        # It loads the tuned model, and says that it is none that answers.
        commands.append(["adapt", base, tuned, "--prompts", str(tmp_path / "prompts.txt"), *out])
    for command in commands:
        code, _, errors = run(*command)
        assert (code, re.search(message, errors) is not None) == (1, True), errors
    code, printed, _ = run("inspect", base, tuned, "--pairing")
    assert code == 0
    assert re.search("refused: .*" + message, printed)
    assert not (tmp_path / "x").exists()


def test_configurations_that_mean_something_else_are_said_once(models, run, tmp_path, caplog):
    made = models(llama(0), llama(1))
    config = json.loads((made.folders[1] / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 12345.0
    (made.folders[1] / "config.json").write_text(json.dumps(config))
    folders = path_of(made, run, tmp_path / "line")
    fm.ReferenceDelta.from_checkpoints(*made.folders)
    fm.RatioSweep(llama(2), *made.folders)
    (said,) = [message for message in caplog.messages if "mean something else" in message]
    assert "differ in rope_theta (10000.0 against 12345.0)" in said
    assert_same_bits(logits(written(folders[0])), logits(made.base))
    assert_same_bits(logits(written(folders[2])), logits(written(made.folders[1])))


def test_the_card_says_what_share_is_merged(models, run, tmp_path):
    made = models(llama(0), llama(1), base_holds={MTP: torch.ones(30, 30)})
    folders = path_of(made, run, tmp_path / "line", "--unmatched", "copy")
    whole = sum(x.nbytes for x in load(folders[1]).values())
    share = f"{1 - 3600 / whole:.2%} of its bytes are interpolated, the others copied."
    assert share in (folders[1] / "README.md").read_text()
