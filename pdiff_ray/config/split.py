"""Which of a zoo's members generators learn, and which are kept back to compare with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random

MEMBER_GROUPS = ("original", "held_out", "second_run")  # in which a zoo's members are judged
MIN_BLOCKS_MEMBERS = 8  # held out of a trajectory, from which they are two blocks instead of one


@dataclass(frozen=True)
class Split:
    """Ids of a zoo's members, in order.

    Attributes:
        learned: K members that generators and baselines learn from.
        held_out: of the same run, or of runs from the same base: the yardstick for samples that continue what was
            learned.
        second_run: of a run of its own: the yardstick for samples that are as new as a further training run.
    """

    learned: tuple[int, ...]
    held_out: tuple[int, ...] = ()
    second_run: tuple[int, ...] = ()

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The ids by the group that the members are judged in."""
        return dict(zip(MEMBER_GROUPS, (self.learned, self.held_out, self.second_run), strict=True))


@functools.cache
def held_out(regime: str, members: int, branches: int, share: float, seed: int) -> frozenset[int]:
    """Returns the ids of the members that are held out.

    None of them may be next to what is learned, or a copy of the neighbour would pass for new: neighbours on a
    trajectory are nearly the same network, and members of a branch share their way. So these are blocks of a
    trajectory, whole branches, and a random choice of independent members.
    """
    random, count = Random(f"{seed}/held out"), round(share * members)
    if not count:
        return frozenset()
    if regime == "independent":
        return frozenset(random.sample(range(members), count))
    if regime == "branches":
        runs = random.sample(range(branches), max(1, round(share * branches)))
        return frozenset(id_ for run in runs for id_ in range(run, members, branches))
    first = count // 2 if count >= MIN_BLOCKS_MEMBERS else count
    # Where the blocks begin among the members that are in none, so that they do not overlap.
    one, other = sorted(random.randint(0, members - count) for _ in range(2))
    return frozenset([*range(one, one + first), *range(other + first, other + count)])
