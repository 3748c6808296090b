"""How a claim is said and judged: sentences and verdicts are made from paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comparisons import Changes, counted

LU, LIN, OURS = "Lu et al. 2024", "Lin et al. 2024", "our question"
RULE = (
    "An improvement *holds* (bold) if its mean is more than twice its standard error above zero and it is one in more "
    "than two thirds of the runs. The standard error is that over pairs of seed and data order, each the mean of its "
    "algorithms, since models of one start are no independent evidence; two orders of one seed still share a start, so "
    "it is rather too small. A claim is confirmed if all improvements that it consists of hold, and not confirmed if "
    "none does; otherwise the verdict says how many do. No verdict is corrected for the number of claims."
)


@dataclass(frozen=True)
class Statement:
    """A sentence that lists differences; those of a statement that decides make the verdict."""

    lead: str
    items: Sequence[tuple[str, Changes]]
    decides: bool = True

    @property
    def present(self) -> list[tuple[str, Changes]]:
        """What has a unit to speak of."""
        return [(label, changes) for label, changes in self.items if changes]

    def __str__(self) -> str:
        if not self.present:
            return f"{self.lead}: not measured."
        return f"{self.lead}: {'; '.join(f'{label} {counted(changes)}' for label, changes in self.present)}."


@dataclass(frozen=True)
class Claim:
    """What is claimed, by whom, and two sentences about it; they are mere text where nothing here can test it."""

    paper: str
    text: str
    sentences: tuple[Statement | str, Statement | str]

    @property
    def verdict(self) -> str:
        """Confirmed, not confirmed, not testable here, or in how many of its comparisons it is confirmed."""
        statements = [sentence for sentence in self.sentences if isinstance(sentence, Statement) and sentence.decides]
        held = [changes.holds for statement in statements for _, changes in statement.present]
        judged = [outcome for outcome in held if outcome is not None]
        if not judged:
            return f"not testable here{' (one run has no spread)' if held else ''}"
        if len(set(judged)) == 1:
            return "confirmed" if judged[0] else "not confirmed"
        return f"confirmed in {sum(judged)} of {len(judged)} comparisons, not confirmed in the others"
