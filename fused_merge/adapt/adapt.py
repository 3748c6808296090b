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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_merge import functional
from fused_merge.adapt.options import AdaptOptions, TargetOptions
from fused_merge.adapt.search import CovarianceSearch, ProjectedAdam, Search, SigmoidAdam, Vector, project_ratios
from fused_merge.distributed import Processes, is_sharded, local_part, sharding_groups, sum_over
from fused_merge.interpolation.layer_ratios import LayerRatios
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.files import expanded
from fused_merge.io.headers import load_json
from fused_merge.io.options import PathOptions
from fused_merge.io.sources import SourceLike, open_source
from fused_merge.io.writer import write_text, writing
from fused_merge.names import canonical_name, layer_of, some
from fused_merge.options import documented, resolve, select
from fused_merge.per_tensor import per_tensor
from fused_merge.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Elements of parameters both ends of which are looked at at once; a larger parameter is alone.
_AT_ONCE = 1 << 25
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
    *,
    lr: float = 0.05,
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

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("rlhf/")
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> batches = [{"input_ids": tokens, "labels": tokens}]
        >>> ratios = fm.adapt_ratios(model, "sft/", "rlhf/", fm.answer_loss, batches, mean_ratio=0.4, parts=2, steps=3)
        >>> ratios
        <LayerRatios of ... tensors: 'layer 0': ..., 'layer 1': ...>
        >>> round(ratios.mean, 6), len(ratios.history)
        (0.4, 3)
    """
    given = {"mean_ratio": mean_ratio, "parts": parts, "steps": steps, "lr": lr, **options}
    o = resolve(given, TargetOptions, AdaptOptions)
    gradients = o["gradients"]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got a {type(model).__name__}")
    processes = Processes.of(model)
    with processes.raising_together():
        sweep = RatioSweep(model, base, tuned, impl=o["impl"], **select(o, PathOptions))
        start = _start(parts, mean_ratio, sweep.names)
        weights = _regularizer_weights(start, sweep.names, o["regularizer_weights"]) * o["regularizer"]
        first = project_ratios(np.array(start.ratios), mean_ratio)
        search: Search
        if not gradients:
            search = CovarianceSearch(first, mean_ratio, lr / 2, o["seed"])
        elif o["parametrization"] == "paper":
            search = SigmoidAdam(np.zeros_like(first), mean_ratio, lr, o["betas"], steps)
        else:
            search = ProjectedAdam(first, mean_ratio, lr, o["betas"], steps)
        journal = expanded(o["journal"]) if processes.is_first and o["journal"] is not None else None
        run = {
            "parts": {label: list(names) for label, names in start.parts.items()},
            "start": list(start.ratios),
            "options": {name: value for name, value in o.items() if name not in _NOT_JOURNALED},
        }
        history = [] if journal is None else _read_journal(journal, run)
    history = processes.from_first(history)
    for entry in history:
        # The search is a function of what it was told, unless another version of it was.
        if not np.allclose(search.propose(), entry["ratios"], rtol=0.0, atol=1e-6):
            raise ValueError(f"step {entry['step']} of {o['journal']} was taken by another search; name another file")
        search.learn(entry["loss"], np.array(entry["gradient"]) if gradients else None)

    stream = islice(_cycle(batches), len(history) * o["accumulate"], None)
    evaluation = _Evaluation(sweep, start, loss_fn, processes, gradients, o["impl"])
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
            history.append(entry)
            with processes.raising_together():
                if journal is not None:
                    write_text(journal, json.dumps({"run": run, "history": history}) + "\n")
            advance(1)
    return LayerRatios(start.parts, search.best().tolist(), history=history)


def answer_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean negative log-likelihood of answers: the paper's proxy, on the aligned model's own.

    Args:
        model: a causal language model of Transformers.
        batch: `input_ids`, `labels` (-100 where nothing is to be learned) and what else the model takes, on its device.

    Returns:
        The loss that the model computes of the batch, 0-d.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> loss = fm.answer_loss(model, batch)
        >>> logits = model(batch["input_ids"]).logits
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor([2, 3])))
        True
    """
    loss: Tensor = model(**batch).loss
    return loss


def reward_weighted_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean over answers of the reward times the mean negative log-likelihood of the answer.

    Args:
        model: a causal language model of Transformers.
        batch: as for `answer_loss`, and `rewards`, `[batch]`, floating: negative ones make an answer less likely.

    Returns:
        The loss, 0-d.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> loss = fm.reward_weighted_loss(model, batch | {"rewards": torch.tensor([2.0])})
        >>> torch.allclose(loss, 2 * fm.answer_loss(model, batch))
        True
    """
    inputs = {key: value for key, value in batch.items() if key not in ("rewards", "labels")}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    counted = (labels != -100).sum(1).clamp(min=1)
    result: Tensor = (batch["rewards"] * losses.view(labels.shape).sum(1) / counted).mean()
    return result


@dataclass
class _Evaluation:
    """The loss of a model at given ratios, and the derivative of the loss by each ratio: means over processes."""

    sweep: RatioSweep[nn.Module]
    start: LayerRatios
    loss_fn: Callable[[nn.Module, Any], Tensor]
    processes: Processes
    gradients: bool
    impl: str

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take the model for evaluations, and give it back as it was."""
        model = self.sweep.model
        with ExitStack() as stack:
            # Reading files, here and below, may fail for one process alone.
            with self.processes.raising_together():
                stack.enter_context(self.sweep.at(self.start))
            aliases = open_source(model, role="model").aliases
            named = ((canonical_name(name), p) for name, p in model.named_parameters())
            self.parameters = [(aliases.get(name, name), p) for name, p in named]
            for _, p in self.parameters:
                stack.callback(_give_back, p, p.requires_grad, p.grad)
                p.requires_grad_(self.gradients and p.is_floating_point())
                p.grad = None
            for part in model.modules():
                if isinstance(part, nn.parallel.DistributedDataParallel):
                    stack.enter_context(part.no_sync())
            yield

    def __call__(self, ratios: LayerRatios, batches: Iterator[Any], count: int) -> tuple[float, Vector | None]:
        """Return the mean loss over the next batches, and its gradient by the ratios if it is wanted."""
        with self.processes.raising_together():
            self.sweep.move_to(ratios)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        with torch.set_grad_enabled(self.gradients):
            for _ in range(count):
                with self.processes.raising_together():
                    batch = next(batches)
                loss = self.loss_fn(self.sweep.model, batch)
                # Before the backward pass, in which a process could wait for one that has failed.
                with self.processes.raising_together():
                    total += self._check(loss) / count
                if self.gradients:
                    torch.autograd.backward(loss / count)
        mean = self.processes.mean(total).item()
        return mean, self._gradient() if self.gradients else None

    def _check(self, loss: Any) -> float:
        is_tensor = isinstance(loss, Tensor)
        if not hasattr(loss, "__float__") or (is_tensor and loss.numel() != 1):
            kind = f"tensor of shape {list(loss.shape)}" if is_tensor else type(loss).__name__
            raise TypeError(f"loss_fn must return one number, got a {kind}; return a mean over the batch")
        value = float(loss.detach() if is_tensor else loss)
        if not math.isfinite(value):
            raise ValueError(f"loss_fn returned {value}; look at the batch, and whether the model's dtype can hold it")
        if self.gradients and not (is_tensor and loss.requires_grad):
            raise ValueError("the loss does not depend on the weights by a graph; pass gradients=False for such losses")
        return value

    def _batches(self) -> Iterator[list[tuple[str, nn.Parameter]]]:
        """Yield the parameters in groups of which both ends may be in memory at once."""
        batch: list[tuple[str, nn.Parameter]] = []
        elements = 0
        for name, p in self.parameters:
            numel = local_part(p).numel()
            if batch and elements + numel > _AT_ONCE:
                yield batch
                batch, elements = [], 0
            batch.append((name, p))
            elements += numel
        yield batch

    def _gradient(self) -> Vector:
        """Return <p.grad, tuned - base> summed over each part, and let go of the gradients."""
        part_of = {name: part for part, names in enumerate(self.start.parts.values()) for name in names}
        # By the processes to add up over: the sum of each part, and how many of its parameters had a gradient.
        sums: dict[tuple[Any, ...], Tensor] = {}
        with self.processes.raising_together():
            for some in self._batches():
                # FSDP2 has averaged the gradient of what it shards; of any other weight each process has its own.
                groups = [sharding_groups(p) if is_sharded(p) else self.processes.groups for _, p in some]
                heres = [sums.setdefault(g, torch.zeros(2, len(self.start.parts), dtype=torch.float64)) for g in groups]
                own = [(here, *each) for here, each in zip(heres, some, strict=True) if each[1].grad is not None]
                ends = [self.sweep.ends_of(name, p) for _, name, p in own]
                products = functional.inner_products(
                    [local_part(p.grad) for *_, p in own if p.grad is not None],
                    [tuned for _, tuned in ends],
                    [base for base, _ in ends],
                    impl=self.impl,
                )
                for (here, name, p), product in zip(own, products, strict=True):
                    here[0, part_of[name]] += product.double().cpu() / (1 if is_sharded(p) else self.processes.size)
                    here[1, part_of[name]] += 1
                    p.grad = None
        totals = [sum_over(here.to(self.processes.device), groups).cpu() for groups, here in sums.items()]
        gradient: Vector
        gradient, found = torch.stack(totals).sum(0).numpy()
        for label, derivative, count in zip(self.start.parts, gradient, found, strict=True):
            if not count:
                raise ValueError(f"no parameter of part {label!r} gets a gradient; make it one part with others")
            if not math.isfinite(derivative):
                what = f"the loss is finite, but its derivative by the ratio of part {label!r} is {derivative}"
                raise ValueError(f"{what}; look at the batch, and whether the model's dtype can hold its gradients")
        return gradient


def _give_back(p: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    p.requires_grad_(requires_grad)
    p.grad = grad


def _read_journal(path: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of this run that a file holds; none if there is no file yet."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    try:
        content = load_json(path.read_bytes())
        run_found, history = content["run"], list(content["history"])
        if not all({"step", "loss", "ratios"} <= entry.keys() for entry in history):
            raise ValueError("a step lacks its loss or ratios")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the journal of a run ({error}); name another file") from error
    if run_found != json.loads(json.dumps(run)):
        raise ValueError(f"{path} is the journal of a run with other arguments; repeat those or name another file")
    return history


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches again and again."""
    seen = 0
    while True:
        before = seen
        for seen, batch in enumerate(batches, before + 1):  # noqa: B007
            yield batch
        if seen == before:
            raise ValueError(f"batches ended after {seen}; pass something that can be cycled, such as a list")


def _has_settled(history: Sequence[Mapping[str, Any]], patience: int, tolerance: float) -> bool:
    recent = np.array([entry["ratios"] for entry in history[-patience - 1 :]])
    return len(recent) > patience and float(np.abs(recent - recent[-1]).max()) <= tolerance


def _regularizer_weights(parts: LayerRatios, names: Sequence[str], weights: str) -> Vector:
    """Return the weight of each part: 1, or the mean over its tensors of 25 / (|layer - L/2| + 1)."""
    if weights == "uniform":
        return np.ones(len(parts.ratios))
    # In the order of the model, which that of the parts need not be.
    layers = list(dict.fromkeys(filter(None, map(layer_of, names))))
    # A tensor outside the layers is as far from the middle as can be: at 0, like the first layer.
    depths = {name: layers.index(layer) if (layer := layer_of(name)) else 0 for name in names}
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
    return LayerRatios.by_parts(names, [mean_ratio] * parts)
