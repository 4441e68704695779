"""The sweeps that are disturbed, in a short form and until many faults are in."""

import random
from collections import Counter
from pathlib import Path

from .suite import Suite

TINY = Path(__file__).parents[1] / "tiny.yaml"
KINDS = ("worker", "node", "add", "driver", "disk", "fail", "hang", "away", "damage", "mlflow", "drain", "all")
SHORT_KINDS = [kind for kind in KINDS if kind != "all"]
RETRIES = 50  # of workers and trials: more than there are faults in a round
PART = 4  # members of a run between its saved states: what a loss can cost it
LONGER = {
    "base": str(TINY),
    "name": "faults",
    "zoo": {"members": 40, "optimizer": {"lr": 0.3}, "steps_per_member": 40},  # long enough to be hit
    "generator": {"autoencoder": {"steps": 1500}, "diffusion": {"steps": 1500}},
    "evaluation": {"networks_per_task": PART},
    "resources": {"workers": 2, "actors": 2, "max_failures": RETRIES},
}
GRID = {
    "max_concurrent": 2,
    "max_retries": RETRIES,
    "parameters": {"zoo.batch_size": [16, 32], "generator.members": [10, 20, 40]},
}
ASHA = {
    "search": "optuna",
    "num_trials": 8,
    "max_concurrent": 1,
    "max_retries": RETRIES,
    "scheduler": "asha",
    "confirm": 0,
    "metric": "generated/mean_validation_loss",
    "parameters": {
        "generator.autoencoder.lr": {"loguniform": [1.0e-6, 1.0e-1]},
        "sampling.sampler": ["ddpm", "ddim"],
        "sampling.steps": {"int": [5, 20], "when": {"sampling.sampler": "ddim"}},
    },
}
SHORT = {
    **LONGER,
    "zoo": {"members": 12, "steps_per_member": 2},
    "generator": {"autoencoder": {"steps": 400}, "diffusion": {"steps": 400}},
    "resources": {"workers": 1, "actors": 1, "max_failures": RETRIES},
}
SHORT_GRID = {"max_concurrent": 2, "max_retries": RETRIES, "parameters": {"generator.members": [4, 12]}}


def disturbed(folder: Path, faults: int, seed: int, small: bool = False) -> None:
    """Disturbs a grid and a search in turns, until so many faults are in; prints what came of it.

    Args:
        faults: if 0, runs the first sweep undisturbed, and prints what is in object storage.
        small: disturbs the sweep of the short form instead.
    """
    sweeps = {"grid": {**LONGER, "sweep": GRID}, "asha": {**LONGER, "sweep": ASHA}}
    if small:
        sweeps = {"small": {**SHORT, "sweep": SHORT_GRID}}
    if not faults:
        with Suite(folder, next(iter(sweeps.values())), random.Random(seed)) as suite:
            undisturbed(suite)
            suite.say("finished")
            for line in suite.stored():
                print(line)
        return
    expected: dict[str, dict[str, object]] = {}
    injected, redone, restarts, number = Counter[str](), list[int](), 0, 0
    while injected.total() < faults:
        name = list(sweeps)[number % len(sweeps)]
        chosen = random.Random(f"{seed} {number}")
        place = folder / f"{number}"
        place.mkdir()
        with Suite(place, sweeps[name], chosen) as suite:
            if name in expected:
                suite.start()
            else:
                expected[name] = undisturbed(suite, in_process=small)
                suite.say(f"{name}: undisturbed run finished")
            # What damage costs a search is a trial that failed, from which it learns.
            kinds = [kind for kind in KINDS if name != "asha" or kind != "damage"]
            deck = [kind for _ in range(3) for kind in chosen.sample(kinds, len(kinds))]
            redone += check(suite, deck, 2.0 if small else 4.0, expected[name])
            injected += suite.injected
            restarts += suite.restarts
            suite.say(f"round {number}, {name}: {suite.injected.total()} faults, the same results")
        number += 1
    for kind in KINDS:
        print(f"{kind:8} {injected[kind]:4} injected")
    print(f"{'in all':8} {injected.total():4} injected; all survived: after each of {number} rounds the same results")
    print(f"the command was typed again {restarts} times")
    seen = f"{sum(redone)} in {len(redone)} runs, {max(redone, default=0)} at most"
    print(f"members trained again after a loss: {seen}, where {PART} may be in flight")
    print("networks and artifacts stored twice: 0")


def undisturbed(suite: Suite, in_process: bool = False) -> dict[str, object]:
    """Returns what comes out if nothing is disturbed."""
    if not in_process:
        suite.start()
    suite.begin("undisturbed")
    suite.launch(in_process)
    if in_process:
        suite.start()  # meanwhile
    suite.run()
    assert not suite.restarts, suite.log.read_text()
    suite.check_driver()
    suite.check_mlflow()
    return suite.results()


def check(
    suite: Suite, kinds: list[str], gap_s: float, expected: dict[str, object], name: str = "disturbed"
) -> list[int]:
    """Disturbs the sweep and compares; returns how many members were made again, by run and loss."""
    suite.begin(name)
    suite.disturb(kinds, gap_s)
    found = suite.results()
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert not (twice := suite.twice()), f"stored twice: {twice}"
    suite.check_mlflow()
    suite.check_driver()
    redone = suite.redone()
    assert max(redone, default=0) <= PART, f"more was made again than was in flight: {redone}"
    return redone
