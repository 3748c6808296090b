"""What is run: sizes, algorithms, contenders and their settings. The README explains the choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Algorithm:
    """One way of preference training; `lr` and `beta` are what every contender starts from."""

    name: str
    title: str
    lr: float
    beta: float | None  # the strength of the pull towards the start; None has none


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("dpo", "DPO", lr=4e-4, beta=0.1),
        Algorithm("ipo", "IPO", lr=2e-4, beta=0.1),
        Algorithm("kto", "KTO", lr=4e-4, beta=0.1),
        Algorithm("grpo", "GRPO", lr=1e-3, beta=0.04),
        Algorithm("rft", "rejection sampling", lr=1e-3, beta=None),
    )
}

ADAMW = "AdamW"  # without anything: what all others are compared with

ALPHAS = (1.5e-3, 4e-3, 1e-2)  # of one step, whatever K


@dataclass(frozen=True)
class Contender:
    """A way to train, or a way to change what AdamW has trained.

    Attributes:
        name: in tables.
        group: `"rival"` needs no optimizer of ours, `"merging"` does.
        settings: the values that it chooses from, on a seed that nothing else is measured on.
        meaning: what a setting is.
        after_adamw: whether it is made from AdamW's run, without a training of its own.
        chosen_with: the contender whose choice it takes instead of making one.
    """

    name: str
    group: str
    settings: tuple[float, ...]
    meaning: str
    after_adamw: bool = False
    chosen_with: str | None = None

    def fits(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm has what the contender changes."""
        return self.name != "beta" or algorithm.beta is not None


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(ADAMW, "rival", (1.0,), "its lr is the algorithm's"),
        Contender("early stop", "rival", (0.25, 0.5, 0.75), "share of the steps", after_adamw=True),
        Contender("learning rate", "rival", (0.25, 0.5, 2.0), "factor of the algorithm's lr"),
        Contender("beta", "rival", (0.3, 3.0, 10.0), "factor of the algorithm's beta"),
        Contender(
            "L2 to SFT", "rival", (0.03, 0.3, 3.0), "lambda of lambda/2 |theta - theta_SFT|^2, added to the loss"
        ),
        Contender("weight EMA", "rival", (0.9, 0.97, 0.99), "decay", after_adamw=True),
        Contender("BEMA", "rival", (0.2, 0.5, 0.8), "bias_power", after_adamw=True),
        Contender("LoRA", "rival", (1.25, 2.5, 5.0), "factor of the algorithm's lr; rank 8, all linear layers"),
        Contender("SFT replay", "rival", (0.1, 0.3, 1.0), "weight of the SFT loss, added to the loss"),
        Contender("half back to SFT", "rival", (1 / 16, 1 / 4, 1 / 2), "every so many steps, as a share of all"),
        Contender("linear merge", "rival", (0.4, 0.6, 0.8), "ratio, 0 is SFT", after_adamw=True),
        Contender("TIES merge", "rival", (0.2, 0.5, 0.8), "density", after_adamw=True),
        Contender("DARE merge", "rival", (0.2, 0.5, 0.8), "density", after_adamw=True),
        Contender("+ c tau", "rival", (0.2, 0.4, 0.6), "c", after_adamw=True),
        Contender("Muon", "rival", (1.0,), "its lr is the algorithm's"),
        Contender("OnDARE", "merging", ALPHAS, "alpha"),
        Contender("OnTIES", "merging", ALPHAS, "alpha"),
        Contender("OnTIES, paper's vote", "merging", ALPHAS, "alpha"),
        Contender("OnProj, gradient", "merging", (0.0, *ALPHAS[:2]), "alpha"),
        Contender("OnProj, update", "merging", (0.0, *ALPHAS[:2]), "alpha"),
        Contender("OnDARE, K = 8", "merging", ALPHAS, "alpha / K", chosen_with="OnDARE"),
        Contender("OnDARE, K = 64", "merging", ALPHAS, "alpha / K", chosen_with="OnDARE"),
        Contender("OnTIES, K = 8", "merging", ALPHAS, "alpha / K", chosen_with="OnTIES"),
        Contender("OnTIES, K = 64", "merging", ALPHAS, "alpha / K", chosen_with="OnTIES"),
        Contender("Muon + OnDARE", "merging", ALPHAS, "alpha"),
    )
}

# Interpolation between the start, ratio 0, and what AdamW has trained, ratio 1.
UNIFORM_RATIOS = (0.2, 0.4, 0.5, 0.6, 0.8)
PART_RATIOS = (0.0, 0.5)  # of one third, while the others stay at 1
SEARCHED_PARTS = (2, 3, 6)
MEAN_RATIO = 0.5  # of the search
# What the search makes better: the likelihood of all answers of the trained model, that of its best-rewarded ones, or
# the reward of answers drawn from the averaged model itself.
OBJECTIVES = ("likelihood", "best answers", "reward")


@dataclass(frozen=True)
class Size:
    """How much of it is run; the sizes of a step are the same for every algorithm."""

    name: str
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    tuning_seed: int | None = 100  # None: everything takes the middle one of its settings
    seeds: tuple[int, ...] = (0, 1, 2)
    orders: tuple[int, ...] = (0, 1)
    base_steps: int = 800  # of the toy's base and SFT, as in the demo
    sft_steps: int = 300
    steps: int = 64  # of preference training
    batch: int = 8  # pairs, answers or samples in a step
    micro_batch: int = 8  # of these at once on a device
    warmup: int = 6
    prompts: int = 256
    samples: int = 8  # answers to each, from which pairs and the best are taken
    new_tokens: int = 40
    max_length: int = 128
    generation_batch: int = 512
    generated_at_once: int = 128  # by GRPO, in groups of 4
    examined_prompts: int = 300
    examined_tasks: int = 40  # of each kind
    best: float = 0.4  # share of the answers that count as best-rewarded, as in the paper
    answers: int = 256  # that the search of ratios learns from
    search_steps: int = 20
    reward_search_steps: int = 24  # evaluations of the search that has no gradients
    reward_search_answers: int = 96

    def __post_init__(self) -> None:
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seed {self.tuning_seed} chooses the settings; what is reported needs other seeds")


FULL = Size("full")
QUICK = Size("quick", algorithms=("dpo", "grpo"), tuning_seed=None, seeds=(0,), orders=(0,))


@dataclass(frozen=True, order=True)
class Training:
    """One training to run: the same start, pairs and order for all that share seed and order."""

    seed: int
    order: int
    algorithm: str
    contender: str
    setting: float

    @property
    def path(self) -> str:
        """Where its results lie."""
        contender = "".join(c if c.isalnum() else "-" for c in self.contender).strip("-")
        return f"seed{self.seed}/order{self.order}/{self.algorithm}/{contender}@{self.setting:g}"


@dataclass(frozen=True)
class Point:
    """One measured model.

    Attributes:
        family: the contender, or one of `"start"`, `"uniform"`, `"low third"`, ..., `"adaptive, K = 2, reward"`.
        setting: the contender's setting, or the (mean) ratio.
        along_tau: how far it lies from the start along tau, in units of tau; `cosine` is that of the two directions.
        ratios: of its parts, where it is an average.
    """

    seed: int
    order: int | None
    algorithm: str | None
    family: str
    setting: float | None
    reward: float
    exact_match: float
    perplexity: float
    along_tau: float
    cosine: float
    ratios: tuple[float, ...] = field(default=())


def middle(contender: Contender) -> float:
    """The setting that is taken where none is chosen."""
    return contender.settings[len(contender.settings) // 2]


def trainings(size: Size, seed: int, order: int, chosen: Mapping[tuple[str, str], float] | None) -> list[Training]:
    """The trainings of one seed and data order: with the chosen settings, or, to choose, with all."""
    listed = []
    for name in size.algorithms:
        for contender in CONTENDERS.values():
            if contender.after_adamw or not contender.fits(ALGORITHMS[name]):
                continue
            if chosen is not None:
                settings = (chosen[name, contender.name],)
            elif contender.chosen_with is None:
                settings = contender.settings
            else:
                settings = ()
            listed += [Training(seed, order, name, contender.name, setting) for setting in settings]
    return listed
