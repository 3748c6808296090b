"""The line under FSDP2 and DDP: two processes do what one does, fail together, and write once."""

from __future__ import annotations

import json
import math
import multiprocessing

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_merge import LayerRatios, RatioSweep, adapt_ratios, evaluate_ratios, interpolate
from fused_merge.distributed import local_box, local_part
from fused_merge.io.sources import same_bits
from fused_merge.names import canonical_name

WORLD = 2
# Whatever takes longer hangs; starting is a matter of the disk.
SECONDS, SECONDS_TO_START = 60, 240
KINDS = ["fsdp", "fsdp that keeps gathered weights", "ddp"]


# --- the processes


def serve(rank, connection, store):
    """Call whatever is asked for, and answer with what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        function, *arguments = asked
        try:
            answer = function(rank, *arguments)
        except BaseException as error:
            answer = error
        connection.send(answer)
    torch.distributed.destroy_process_group()


class Pair:
    """Two processes of one group, started at the first call and again after one that hangs."""

    def __init__(self, folder):
        self._folder = folder
        self._started = 0
        self._processes = []

    def __call__(self, function, *arguments):
        """Return what `function(rank, *arguments)` returned or raised on each of them."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, *arguments))
        return self._answers(SECONDS)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._started += 1
        store = self._folder / f"store{self._started}"
        pipes = [context.Pipe() for _ in range(WORLD)]
        self._connections = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=serve, args=(rank, theirs, store), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        self._answers(SECONDS_TO_START)

    def _answers(self, seconds):
        if not all(connection.poll(seconds) for connection in self._connections):
            self.stop()
            pytest.fail("a process hangs")
        return [connection.recv() for connection in self._connections]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


def both(answers):
    """Return the answers of two processes that ended well."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


# --- models


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        # Of one element the second process holds nothing.
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x):
        return x + self.gain * torch.tanh(self.linear(x))


class Network(nn.Module):
    """No first dimension is even; the head is tied, and buffers are whole on every process."""

    def __init__(self, seed, dtype=torch.float64, frozen=False):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(5)
        nn.init.normal_(self.norm.weight, 1.0, 0.1)
        nn.init.normal_(self.norm.bias, 0.0, 0.1)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(seed))
        self.to(dtype)
        self.layers[0].linear.weight.requires_grad_(not frozen)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.T * self.scale.sum()


PARTS = LayerRatios.by_patterns(Network(0), {r"embed.*|layers\.0.*": 0.3, ".*": 0.7})


def batch_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(7, (4, 6), generator=generator)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def wrapped(kind, seed=2, **options):
    """A model under FSDP2 or DDP, or one of several that know nothing of one another."""
    model = Network(seed, **options)
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "replica":
        return model
    keep = kind != "fsdp"
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep)
    return fully_shard(model, mesh=mesh, reshard_after_forward=not keep)


def held(model):
    """Copies of what this process holds of a model, with the boxes of the whole tensors that these are."""
    if not isinstance(model, DistributedDataParallel) and hasattr(model, "reshard"):
        for part in model.modules():
            if hasattr(part, "reshard"):
                part.reshard()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {canonical_name(name): (local_box(t), local_part(t.detach()).clone()) for name, t in tensors.items()}


def assert_held(model, whole):
    """Assert that a process holds its part of every tensor of a state dict, bit for bit."""
    parts = held(model)
    assert parts.keys() == whole.keys()
    for name, (box, part) in parts.items():
        assert same_bits(part, whole[name] if box is None else whole[name][box]), name


def ends():
    return Network(0), Network(1)


def points_of(ratios, dtype=torch.float64):
    return interpolate(Network(0, dtype).state_dict(), Network(1, dtype).state_dict(), ratios)


# --- RatioSweep

RATIOS = [0.0, 0.3, PARTS, 1.0, 1.2]


def sweep(rank, kind, dtype, folder):
    """Go along the line, from the files of a folder if there is one, and come back."""
    base, tuned = Network(0, dtype), Network(1, dtype)
    if folder is not None:
        base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    model, before = wrapped(kind, dtype=dtype), Network(2, dtype).state_dict()
    line = RatioSweep(model, base, tuned)
    points = points_of(RATIOS, dtype)
    for ratio, point in zip(RATIOS, points, strict=True):
        with line.at(ratio):
            assert_held(model, point)
        assert_held(model, before)
    with line.at(0.5):
        for ratio, point in zip(RATIOS, points, strict=True):
            line.move_to(ratio)
            assert_held(model, point)
    assert_held(model, before)
    return [0 in part.shape for _, part in held(model).values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("where", ["memory", "files"])
def test_each_process_holds_the_bits_of_its_part(kind, dtype, where, pair, tmp_path):
    if where == "files":
        from safetensors.torch import save_file

        for name, seed in (("base", 0), ("tuned", 1)):
            save_file(Network(seed, dtype).state_dict(), tmp_path / f"{name}.safetensors")
    empty = both(pair(sweep, kind, dtype, tmp_path if where == "files" else None))
    # Of a single element the second process has nothing to write.
    assert [any(found) for found in empty] == [False, kind != "ddp"]


def forward_after_moving(rank, kind):
    model, base_tuned = wrapped(kind), ends()
    line, batch = RatioSweep(model, *base_tuned), batch_of(0)
    expected = []
    whole = Network(3)
    for point in [*points_of(RATIOS), Network(2).state_dict()]:
        whole.load_state_dict(point)
        expected.append(whole(batch).detach())
    found = []
    with torch.no_grad():
        # So that there are gathered weights to be used by mistake.
        model(batch)
        with line.at(0.1):
            for ratio in RATIOS:
                line.move_to(ratio)
                found.append(model(batch))
        found.append(model(batch))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_uses_the_weights_that_were_just_written(kind, pair):
    both(pair(forward_after_moving, kind))


def fail_inside(rank, kind):
    model = wrapped(kind)
    line = RatioSweep(model, *ends())
    try:
        with line.at(0.5):
            # FSDP2 is left with gathered weights.
            model(batch_of(0))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert_held(model, Network(2).state_dict())
    batch = batch_of(0)
    assert torch.equal(model(batch), Network(2)(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_come_back_after_an_exception(kind, pair):
    both(pair(fail_inside, kind))


# --- adapt_ratios

OPTIONS = {"parts": PARTS, "mean_ratio": 0.5, "steps": 6, "progress": False}


def adapt(rank, kind, options):
    """Adapt with a batch of its own on each process, and alone with both; return the ratios of either."""
    model = wrapped(kind, frozen=True)
    # A parameter that was frozen when FSDP2 gathered it has to get its gradient nevertheless.
    loss_of(model, batch_of(0)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert [name for name, grad in grads.items() if grad is None] == frozen
    assert len(frozen) == 1
    found = adapt_ratios(model, *ends(), loss_of, [batch_of(rank)], **OPTIONS | options)
    assert_held(model, Network(2).state_dict())
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    both_batches = options | {"accumulate": 2}
    alone = adapt_ratios(Network(2), *ends(), loss_of, [batch_of(0), batch_of(1)], **OPTIONS | both_batches)
    return found, found.history, alone, alone.history


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_with_a_batch_each_are_one_with_both(kind, accumulate, pair):
    answers = both(pair(adapt, kind, {"accumulate": accumulate}))
    assert answers[0] == answers[1]
    ratios, history, alone, alone_history = answers[0]
    assert ratios.ratios != PARTS.ratios
    # The sums, in fp64, are those of other orders, and six steps make little of that.
    assert ratios.ratios == pytest.approx(alone.ratios, rel=0, abs=1e-13)
    for one, other in zip(history, alone_history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-13)
        assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_without_gradients_is_the_same_on_both(kind, pair):
    answers = both(pair(adapt, kind, {"gradients": False, "steps": 10}))
    assert answers[0] == answers[1]
    ratios, history, alone, _ = answers[0]
    assert len(history) == 10
    assert ratios.ratios == pytest.approx(alone.ratios, abs=1e-12)


def adapt_alone(rank):
    """Adapt replicas that no wrapper ties together: none waits for another, and each takes its own batch."""
    if rank == 0:
        return None
    return adapt_ratios(wrapped("replica"), *ends(), loss_of, [batch_of(rank)], **OPTIONS).ratios


def test_replicas_that_nothing_ties_together_are_alone(pair):
    _, ratios = both(pair(adapt_alone))
    expected = adapt_ratios(Network(2), *ends(), loss_of, [batch_of(1)], **OPTIONS).ratios
    assert ratios == pytest.approx(expected, abs=1e-13)


def adapt_counting_reductions(rank):
    model, buckets = wrapped("ddp"), []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    adapt_ratios(model, *ends(), loss_of, [batch_of(rank)], **OPTIONS)
    assert not buckets
    loss_of(model, batch_of(rank)).backward()
    return len(buckets)


def test_ddp_reduces_no_gradient_meanwhile_and_all_afterwards(pair):
    assert min(both(pair(adapt_counting_reductions))) > 0


def adapt_badly(rank, kind, fault, folder):
    """One process gets something bad, or cannot read at the n-th time: entering, moving, in a gradient."""
    model, base, tuned = wrapped(kind), *ends()
    journal, batches, calls = None, [batch_of(rank)], []
    loss_fn = loss_of
    if fault == "nan" and rank == 1:

        def loss_fn(model, batch):
            calls.append(1)
            return loss_of(model, batch) * (math.nan if len(calls) == 3 else 1)

    elif fault == "batches" and rank == 0:
        batches = iter([batch_of(rank)] * 2)
    elif fault == "journal":
        journal = folder / "file" / "journal.json"
    elif fault == "later journal":
        # A file takes the folder's place when two steps are in it.
        journal = folder / "there" / "journal.json"

        def loss_fn(model, batch):
            calls.append(1)
            if len(calls) == 3 and rank == 0:
                journal.unlink()
                journal.parent.rmdir()
                journal.parent.touch()
            return loss_of(model, batch)

    elif fault == "base" and rank == 1:
        tuned = Network(1, torch.float32)
    elif isinstance(fault, int) and rank == 1:
        read = RatioSweep.ends_of

        def ends_of(self, name, weight):
            calls.append(name)
            if len(calls) == fault:
                raise OSError("the disk went away")
            return read(self, name, weight)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RatioSweep, "ends_of", ends_of)
            return adapt_and_look(model, base, tuned, loss_fn, batches, journal)
    return adapt_and_look(model, base, tuned, loss_fn, batches, journal)


def adapt_and_look(model, base, tuned, loss_fn, batches, journal):
    try:
        adapt_ratios(model, base, tuned, loss_fn, batches, **OPTIONS, journal=journal)
    finally:
        assert_held(model, Network(2).state_dict())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "first", "error", "message"),
    [
        ("nan", 1, ValueError, "loss_fn returned nan; look at the batch"),
        ("batches", 0, ValueError, "batches ended after 2; pass something that can be gone through again"),
        ("journal", 0, OSError, "cannot write .*journal.json"),
        ("later journal", 0, OSError, "cannot write .*journal.json"),
        ("base", 1, ValueError, "do not match: .* is torch.float64 and torch.float32"),
        (5, 1, OSError, "the disk went away"),
        (15, 1, OSError, "the disk went away"),
        (25, 1, OSError, "the disk went away"),
    ],
)
def test_what_stops_one_process_stops_both(kind, fault, first, error, message, pair, tmp_path):
    (tmp_path / "file").touch()
    answers = pair(adapt_badly, kind, fault, tmp_path)
    with pytest.raises(error, match=message):
        raise answers[first]
    with pytest.raises(RuntimeError, match="stopped because another process failed; see its error"):
        raise answers[1 - first]


def adapt_twice(rank, kind, folder):
    """A run that is killed in its fourth step, and goes on; only the first process knows of the journal's folder."""
    journal, seen = folder / f"rank{rank}" / "journal.json", []

    def loss_fn(model, batch):
        seen.append(int(batch[0, 0]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    model, batches = wrapped(kind), [batch_of(rank).roll(i, 1) for i in range(3)]
    try:
        adapt_ratios(model, *ends(), loss_fn, batches, **OPTIONS, journal=journal)
    except KeyboardInterrupt:
        assert_held(model, Network(2).state_dict())
    found = adapt_ratios(model, *ends(), loss_fn, batches, **OPTIONS, journal=journal)
    order = [int(batch[0, 0]) for batch in batches] * 2
    assert seen == order[:4] + order[3:]
    whole = adapt_ratios(wrapped(kind), *ends(), loss_of, batches, **OPTIONS)
    return found, found.history, whole, whole.history


@pytest.mark.parametrize("kind", KINDS)
def test_the_journal_of_the_first_process_is_that_of_both(kind, pair, tmp_path):
    answers = both(pair(adapt_twice, kind, tmp_path))
    assert answers[0] == answers[1]
    found, history, whole, whole_history = answers[0]
    assert (found, history) == (whole, whole_history)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json*")] == ["rank0/journal.json"]
    assert len(json.loads((tmp_path / "rank0/journal.json").read_text())["history"]) == OPTIONS["steps"]


# --- evaluate_ratios


def evaluate(rank, kind, folder, fault):
    """Score on batches of each process's own: what counts is the first one's."""
    model = wrapped(kind)

    def loss(model):
        with torch.no_grad():
            return loss_of(model, batch_of(rank))

    def own(model):
        calls.append(1)
        if fault == "nan" and rank == 1 and len(calls) == 2:
            return math.nan
        if fault == "stop" and len(calls) == 2:
            raise KeyboardInterrupt
        return {"rank": rank}

    own.lower_is_better = {"rank"} if rank == 0 else set()
    calls = []
    out = folder / "out" if rank == 0 else folder / "nowhere"
    try:
        rows = evaluate_ratios(
            RatioSweep(model, *ends()),
            {"0.25": 0.25, "parts": dict(PARTS), "1": 1},
            {"loss": loss, "own": own},
            out,
            progress=False,
        )
    finally:
        assert_held(model, Network(2).state_dict())
    return rows, len(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_first_processs_and_written_by_it_alone(kind, pair, tmp_path):
    # What the second process finds at its own place is no concern of the sweep.
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere/results.json").write_text("another's")
    for answer in pair(evaluate, kind, tmp_path, "stop"):
        assert isinstance(answer, KeyboardInterrupt)
    answers = both(pair(evaluate, kind, tmp_path, None))
    assert answers[0] == answers[1]
    rows, calls = answers[0]
    # The second process has learnt from the first that one ratio was finished.
    assert calls == 2
    whole, batch = Network(3), batch_of(0)
    for row, point in zip(rows, points_of([0.25, PARTS, 1.0]), strict=True):
        whole.load_state_dict(point)
        assert row.scores == {"loss": loss_of(whole, batch).item(), "own/rank": 0.0}
    assert [file.name for file in (tmp_path / "nowhere").iterdir()] == ["results.json"]
    assert (tmp_path / "nowhere/results.json").read_text() == "another's"
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["label"] for row in document["rows"]] == ["0.25", "parts", "1"]
    assert document["lower_is_better"] == ["own/rank"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_none_stops_both(kind, pair, tmp_path):
    answers = pair(evaluate, kind, tmp_path, "nan")
    with pytest.raises(RuntimeError, match=r"scorer 'own' at ratio parts returned nan, .* \(1 of 3 ratios are fin"):
        raise answers[1]
    with pytest.raises(RuntimeError, match="stopped because another process failed"):
        raise answers[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_only_the_first_process_cannot_write_to_stops_both(kind, pair, tmp_path):
    (tmp_path / "out").touch()
    answers = pair(evaluate, kind, tmp_path, None)
    with pytest.raises(OSError, match=r"cannot write .*out/results.json"):
        raise answers[0]
    with pytest.raises(RuntimeError, match="stopped because another process failed"):
        raise answers[1]
