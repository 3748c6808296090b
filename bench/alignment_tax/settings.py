"""What is run: sizes, seeds and the list of preference trainings. The README's tables explain the choices."""

from __future__ import annotations

from dataclasses import dataclass

SFT_SHARE = 0.7  # the start of the preference training: base + 0.7 * (full SFT - base)
RATIOS = (0.2, 0.4, 0.5, 0.6, 0.8, 0.9)  # of the way from the start to the preference-trained model
ADDED_TAU = (0.2, 0.4, 0.6)  # c of "AdamW, then + c*tau", and of the pre-check "start + c*tau"


@dataclass(frozen=True)
class Run:
    """One preference training: where it starts, its optimizer, and what it is in the comparison."""

    name: str
    optimizer: str  # adamw | ondare | onties
    lr: float = 4e-4
    alpha: float = 0.0
    reserve_rate: float = 0.5
    start: str = "sft"  # sft | sft-full
    tau: str = "sft"  # sft | shuffled
    role: str = "method"  # adamw | method | control


def adamw(lr: float, start: str = "sft", role: str = "adamw") -> Run:
    """Plain AdamW, the method without merging."""
    suffix = "" if start == "sft" else f"-from-{start}"
    return Run(f"adamw-lr{lr:.0e}{suffix}".replace("e-0", "e-"), "adamw", lr=lr, start=start, role=role)


@dataclass(frozen=True)
class Setting:
    """Sizes, seeds and trainings of one experiment."""

    name: str
    seeds: tuple[int, ...]
    orders: tuple[int, ...]
    runs: tuple[Run, ...]
    base_steps: int = 800
    sft_steps: int = 300
    dpo_steps: int = 100
    prompts: int = 700

    @property
    def starts(self) -> tuple[str, ...]:
        """The checkpoints from which preferences are trained, in the order of the runs."""
        return tuple(dict.fromkeys(run.start for run in self.runs))

    def runs_from(self, start: str) -> list[Run]:
        """The preference trainings that begin at `start`."""
        return [run for run in self.runs if run.start == start]


MAIN = adamw(4e-4)  # at the learning rate of the methods

METHODS = (Run("ondare", "ondare", alpha=4e-3), Run("onties", "onties", alpha=4e-3))

FROM_FULL = tuple(adamw(lr, start="sft-full", role="control") for lr in (2e-4, 4e-4))

QUICK = Setting("quick", seeds=(0,), orders=(0,), runs=(MAIN, adamw(2e-4), *METHODS, *FROM_FULL))

FULL = Setting(
    "full",
    seeds=(0, 1, 2),
    orders=(0, 1),
    runs=(
        adamw(1e-4),
        adamw(2e-4),
        MAIN,
        adamw(1e-3),
        *METHODS,
        Run("onties-alpha1e-3", "onties", alpha=1e-3),
        Run("ondare-alpha0", "ondare", role="control"),
        Run("onties-alpha0", "onties", role="control"),
        Run("ondare-shuffled", "ondare", alpha=4e-3, tau="shuffled", role="control"),
        Run("onties-shuffled", "onties", alpha=4e-3, tau="shuffled", role="control"),
        *FROM_FULL,
        Run("ondare-from-sft-full", "ondare", alpha=4e-3, start="sft-full", role="control"),
        Run("onties-from-sft-full", "onties", alpha=4e-3, start="sft-full", role="control"),
    ),
)
