"""Adaptive model averaging: a ratio for each part of the network, found by optimization.

The loss is minimized over r in {0 <= r_k <= 1, mean of r_k = rho}, the weights of part k being
theta0 + r_k * (theta1 - theta0). Its gradient is exact and needs no graph over the weights: after an ordinary backward
pass of the model at theta(r), dL/dr_k is the sum over the part of <dL/dtheta, theta1 - theta0>.

Source: Lin et al. 2024 (arXiv 2309.06256), section 5; "the paper" below is its text and published code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_merge import functional
from fused_merge.adapt.options import AdaptOptions, TargetOptions
from fused_merge.adapt.search import CovarianceSearch, ProjectedAdam, Search, SigmoidAdam, Vector
from fused_merge.distributed import Processes, is_sharded, local_part, sharding_groups, sum_over
from fused_merge.interpolation.layer_ratios import LayerRatios
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.headers import load_json
from fused_merge.io.sources import PathLike, SourceLike, open_source
from fused_merge.io.writer import write_text, writing
from fused_merge.names import canonical_name, layer_of, some
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import per_tensor
from fused_merge.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Options that its journal does not list: the steps do not depend on them, or it has them in another form.
_NOT_JOURNALED = ("parts", "patience", "tolerance", "journal", "impl", "progress")


@documented(TargetOptions, AdaptOptions)
def adapt_ratios(
    model: nn.Module,
    base: SourceLike,
    tuned: SourceLike,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    mean_ratio: float = 0.4,
    parts: int | LayerRatios = 3,
    steps: int = 100,
    **options: Unpack[AdaptOptions],
) -> LayerRatios:
    """Find a ratio for each part of the network that minimizes a loss, at a given mean ratio.

    Adam on r itself, with a learning rate that falls to 0 as a cosine, and after each step the projection onto
    {0 <= r_k <= 1, mean = rho} in the metric of the second moments. The model is written in place and gets back its
    bits, its gradients and its `requires_grad` at the end, also after an exception. Put it into evaluation mode first
    if dropout is not wanted.

    With FSDP2 each process reads and writes its own elements, and with DDP or FSDP2 each has its own batches: the loss
    is the mean over processes, as in training, and all return the same ratios. DDP then reduces no gradients: only K
    inner products are reduced. A bad batch, loss, file or journal stops all processes; a `loss_fn` that raises
    stops its own, as in training. Processes whose models nothing ties together do not wait for one another. Weights in
    bf16 or fp16 work, and so does autocast within `loss_fn`; inner products are taken in fp32.

    Args:
        model: any module whose parameters carry the names of the checkpoints.
        base: theta0, r = 0: a module, a state dict, a safetensors file or a Hugging Face folder, read tensor by tensor.
        tuned: theta1, r = 1: the same.
        loss_fn: called as `loss_fn(model, batch)`; returns a scalar to minimize. `answer_loss` on answers of the
            aligned model is the paper's; `reward_weighted_loss` weighs each by its reward.
        batches: whatever `loss_fn` takes, cycled; an iterator, which cannot be cycled, must not end.
        {options}

    Returns:
        The ratios; `.history` has step, loss, ratios and, with gradients, the gradient of every evaluation; loss and
        gradient include the regularizer.

    Raises:
        ValueError: if an option is out of range, models do not match, a loss or gradient is not finite, no parameter of
            a part gets a gradient, or the journal is another run's; the sentence says which.
        TypeError: if `parts` or what `loss_fn` returns is of a wrong kind.
        RuntimeError: if another process has raised one of these.
        ModuleNotFoundError: without gradients and without `cma`.
    """
    o = resolve({"mean_ratio": mean_ratio, "parts": parts, "steps": steps, **options}, TargetOptions, AdaptOptions)
    lr, betas, gradients = o["lr"], o["betas"], o["gradients"]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got a {type(model).__name__}")
    processes = Processes.of(model)
    with processes.raising_together():
        sweep = RatioSweep(model, base, tuned, impl=o["impl"])
        start = _start(parts, mean_ratio, sweep.names)
        weights = _regularizer_weights(start, sweep.names, o["regularizer_weights"]) * o["regularizer"]
        search: Search
        if not gradients:
            search = CovarianceSearch(np.array(start.ratios), mean_ratio, lr / 2, o["seed"])
        elif o["parametrization"] == "paper":
            search = SigmoidAdam(len(start.ratios), mean_ratio, lr, betas, steps)
        else:
            search = ProjectedAdam(np.array(start.ratios), mean_ratio, lr, betas, steps)
        journal = _Journal(
            o["journal"] if processes.is_first else None,
            {
                "parts": {label: list(names) for label, names in start.parts.items()},
                "start": list(start.ratios),
                "options": {name: value for name, value in o.items() if name not in _NOT_JOURNALED},
            },
        )
    history = journal.entries = processes.from_first(journal.entries)
    for entry in history:
        # The search is a function of what it was told, unless another version of it was.
        if not np.allclose(search.propose(), entry["ratios"], rtol=0.0, atol=1e-6):
            raise ValueError(f"step {entry['step']} of {o['journal']} was taken by another search; name another file")
        search.learn(entry["loss"], np.array(entry["gradient"]) if gradients else None)

    stream = _cycle(batches, skip=len(history) * o["accumulate"])
    evaluation = _Evaluation(sweep, start, loss_fn, processes, gradients=gradients, impl=o["impl"])
    shown = o["progress"] and processes.is_first
    with evaluation.running(), progress_bar("adapting ratios", steps, unit="steps", enabled=shown) as advance:
        advance(len(history))
        while len(history) < steps and not _has_settled(history, o["patience"], o["tolerance"]):
            ratios = search.propose()
            loss, gradient = evaluation(start.replace(ratios.tolist()), stream, o["accumulate"])
            loss += float(np.sum(weights * (ratios - mean_ratio) ** 2))
            entry = {"step": len(history), "loss": loss, "ratios": ratios.tolist()}
            if gradient is not None:
                gradient = gradient + 2 * weights * (ratios - mean_ratio)
                entry["gradient"] = gradient.tolist()
            search.learn(loss, gradient)
            with processes.raising_together():
                journal.add(entry)
            advance(1)
    return LayerRatios(start.parts, search.best().tolist(), history=history)


def answer_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean negative log-likelihood of answers: the paper's proxy, on the aligned model's own.

    Args:
        model: a causal language model of Transformers.
        batch: `input_ids`, `labels` (-100 where nothing is to be learned) and what else the model takes, on its device.
    """
    loss: Tensor = model(**batch).loss
    return loss


def reward_weighted_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean over answers of the reward times the mean negative log-likelihood of the answer.

    Args:
        model: a causal language model of Transformers.
        batch: as for `answer_loss`, and `rewards`, `[batch]`, floating: negative ones make an answer less likely.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("rewards", "labels")}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    counted = (labels != -100).sum(1).clamp(min=1)
    result: Tensor = (batch["rewards"] * losses.view(labels.shape).sum(1) / counted).mean()
    return result


class _Evaluation:
    """The loss of a model at given ratios, and the derivative of the loss by each ratio: means over processes."""

    def __init__(
        self,
        sweep: RatioSweep[nn.Module],
        parts: LayerRatios,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        processes: Processes,
        *,
        gradients: bool,
        impl: str,
    ) -> None:
        self._sweep = sweep
        self._labels = tuple(parts.parts)
        self._part = {name: part for part, names in enumerate(parts.parts.values()) for name in names}
        self._start = parts
        self._loss_fn = loss_fn
        self._processes = processes
        self._gradients = gradients
        self._impl = impl

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take the model for evaluations, and give it back as it was."""
        model = self._sweep.model
        with ExitStack() as stack:
            # Reading files, here and below, may fail for one process alone.
            with self._processes.raising_together():
                stack.enter_context(self._sweep.at(self._start))
            aliases = open_source(model, role="model").aliases
            named = ((canonical_name(name), p) for name, p in model.named_parameters())
            self._parameters = [(aliases.get(name, name), p) for name, p in named]
            found = [(p, p.requires_grad, p.grad) for _, p in self._parameters]
            try:
                for p, _, _ in found:
                    p.requires_grad_(self._gradients and p.is_floating_point())
                    p.grad = None
                for part in model.modules():
                    if isinstance(part, nn.parallel.DistributedDataParallel):
                        stack.enter_context(part.no_sync())
                yield
            finally:
                for p, requires_grad, grad in found:
                    p.requires_grad_(requires_grad)
                    p.grad = grad

    def __call__(self, ratios: LayerRatios, batches: Iterator[Any], count: int) -> tuple[float, Vector | None]:
        """Return the mean loss over the next batches, and its gradient by the ratios if it is wanted."""
        with self._processes.raising_together():
            self._sweep.move_to(ratios)
        total = torch.zeros((), dtype=torch.float64, device=self._processes.device)
        with torch.set_grad_enabled(self._gradients):
            for _ in range(count):
                with self._processes.raising_together():
                    batch = next(batches)
                loss = self._loss_fn(self._sweep.model, batch)
                # Before the backward pass, in which a process could wait for one that has failed.
                with self._processes.raising_together():
                    total += self._check(loss) / count
                if self._gradients:
                    torch.autograd.backward(loss / count)
        mean = self._processes.mean(total).item()
        return mean, self._gradient() if self._gradients else None

    def _check(self, loss: Any) -> float:
        if not hasattr(loss, "__float__") or (isinstance(loss, Tensor) and loss.numel() != 1):
            kind = f"tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return one number, got a {kind}; return a mean over the batch")
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            raise ValueError(f"loss_fn returned {value}; look at the batch, and whether the model's dtype can hold it")
        if self._gradients and not (isinstance(loss, Tensor) and loss.requires_grad):
            raise ValueError("the loss does not depend on the weights by a graph; pass gradients=False for such losses")
        return value

    def _gradient(self) -> Vector:
        """Return <p.grad, tuned - base> summed over each part, and let go of the gradients."""
        with self._processes.raising_together():
            sums = self._products()
        totals = [sum_over(here.to(self._processes.device), groups).cpu() for groups, here in sums.items()]
        gradient: Vector
        gradient, found = torch.stack(totals).sum(0).numpy()
        for label, derivative, count in zip(self._labels, gradient, found, strict=True):
            if not count:
                raise ValueError(f"no parameter of part {label!r} gets a gradient; make it one part with others")
            if not math.isfinite(derivative):
                raise ValueError(
                    f"the loss is finite, but its derivative by the ratio of part {label!r} is {derivative}; look at "
                    "the batch, and whether the model's dtype can hold its gradients"
                )
        return gradient

    def _products(self) -> dict[tuple[Any, ...], Tensor]:
        """Return, by the processes to add up over, the sum of each part and how many parameters had a gradient."""
        sums: dict[tuple[Any, ...], Tensor] = {}
        for name, p in self._parameters:
            # FSDP2 has averaged the gradient of what it shards; of any other weight each process has its own.
            own = not is_sharded(p)
            groups = self._processes.groups if own else sharding_groups(p)
            here = sums.setdefault(groups, torch.zeros(2, len(self._labels), dtype=torch.float64))
            if p.grad is None:
                continue
            base, tuned = self._sweep.ends_of(name, p)
            (product,) = functional.inner_products([local_part(p.grad)], [tuned], [base], impl=self._impl)
            here[0, self._part[name]] += product.double().cpu() / (self._processes.size if own else 1)
            here[1, self._part[name]] += 1
            p.grad = None
        return sums


class _Journal:
    """The steps of a run, in a file if there is one."""

    def __init__(self, path: PathLike | None, run: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._run = dict(run)
        self.entries: list[dict[str, Any]] = []
        if self._path is None:
            return
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        try:
            found = load_json(self._path.read_bytes())
            run_found, self.entries = found["run"], list(found["history"])
            if not all({"step", "loss", "ratios"} <= entry.keys() for entry in self.entries):
                raise ValueError("a step lacks its loss or ratios")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the journal of a run ({error}); name another file") from error
        if run_found != json.loads(json.dumps(self._run)):
            raise ValueError(f"{path} is the journal of a run with other arguments; repeat those or name another file")

    def add(self, entry: dict[str, Any]) -> None:
        """Keep one more step."""
        self.entries.append(entry)
        if self._path is not None:
            write_text(self._path, json.dumps({"run": self._run, "history": self.entries}) + "\n")


def _cycle(batches: Iterable[Any], *, skip: int) -> Iterator[Any]:
    """Yield batches again and again, leaving out what was used before."""
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            if seen > skip:
                yield batch
        if seen == before:
            raise ValueError(
                f"batches ended after {seen}; pass something that can be gone through again, such as a list or a loader"
            )


def _has_settled(history: Sequence[Mapping[str, Any]], patience: int, tolerance: float) -> bool:
    recent = np.array([entry["ratios"] for entry in history[-patience - 1 :]])
    return len(recent) > patience and float(np.abs(recent - recent[-1]).max()) <= tolerance


def _regularizer_weights(parts: LayerRatios, names: Sequence[str], weights: str) -> Vector:
    """Return the weight of each part: 1, or the mean over its tensors of 25 / (|layer - L/2| + 1)."""
    if weights == "uniform":
        return np.ones(len(parts.ratios))
    # In the order of the model, which that of the parts need not be.
    layers = list(dict.fromkeys(layer for name in names if (layer := layer_of(name)) is not None))
    # A tensor outside the layers is as far from the middle as can be: at 0, like the first layer.
    depths = {name: 0 if (layer := layer_of(name)) is None else layers.index(layer) for name in names}
    weight = {name: 25.0 / (abs(depth - len(layers) / 2) + 1.0) for name, depth in depths.items()}
    return np.array([np.mean([weight[name] for name in part if name in weight]) for part in parts.parts.values()])


def _start(parts: int | LayerRatios, mean_ratio: float, names: Sequence[str]) -> LayerRatios:
    if isinstance(parts, LayerRatios):
        per_tensor(parts, names, what="parts")
        if idle := [label for label, part in parts.parts.items() if set(names).isdisjoint(part)]:
            raise ValueError(f"part {some(map(repr, idle))} holds no tensor of the model; leave it out")
        return parts
    if not isinstance(parts, int):
        raise TypeError(f"parts must be how many there are to be, or LayerRatios, got a {type(parts).__name__}")
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    return LayerRatios.by_parts(names, [mean_ratio] * parts)
