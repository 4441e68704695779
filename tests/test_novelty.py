"""The verdict in weight space, on small zoos that need no training: vectors of known kinds get their word."""

import json
import math

import numpy as np
import pytest
import torch

from pdiff_ray.evaluation.copying import data_copying, effective_number
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.kinds import BANDWIDTHS, Family, Kind
from pdiff_ray.evaluation.metrics import named_metrics
from pdiff_ray.evaluation.novelty import Known, assess

K, D, N = 60, 300, 100
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 3.0)


def random(seed):
    return torch.Generator().manual_seed(seed)


def independent(count, seed):
    """Networks of their own: values that depend on each other, in more directions than a zoo has members."""
    mixing = torch.randn(200, D, generator=random(0)) * torch.linspace(1, 0.1, 200)[:, None]
    return 5 + torch.randn(count, 200, generator=random(seed)) @ mixing / 200**0.5


def runs(count, seed):
    """Networks along one run: a random walk that is drawn back, whose neighbours are alike."""
    noise = torch.randn(count + 20, 200, generator=random(seed))
    walk = [torch.zeros(200)]
    for step in noise:
        walk.append(0.8 * walk[-1] + step)
    return 5 + torch.stack(walk[21:]) @ torch.randn(200, D, generator=random(0)) / 200**0.5


def draws(members, seed, count=N):
    """Vectors of each family: name to word, draws and what is interpolated."""
    g, k = random(seed), len(members)
    mean, centred = members.mean(0), members - members.mean(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    pick = lambda: torch.randint(k, (count,), generator=g)  # noqa: E731
    several = lambda of: torch.stack([torch.randperm(k, generator=g)[:of] for _ in range(count)])  # noqa: E731
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    pca = lambda rank: mean + normal(count, rank) * s[:rank] / (k - 1) ** 0.5 @ v[:rank]  # noqa: E731
    first, second = several(2).T
    share = torch.rand(count, 1, generator=g)
    found = {"member": Family("replica", members[pick()])}
    for sigma in SIGMAS:
        found[f"noise {sigma}"] = Family("replica", members[pick()] + sigma * members.std() * normal(count, D))
    for bandwidth in BANDWIDTHS:
        moved = bandwidth * normal(count, k) @ centred / (k - 1) ** 0.5
        found[f"deviation {bandwidth}"] = Family("replica", members[pick()] + moved)
    for of in (2, 4, 16):
        found[f"average {of}"] = Family("interpolation", members[several(of)].mean(1), "the mean")
    found["between"] = Family("interpolation", members[first] * share + members[second] * (1 - share), "pairs")
    for rank in (5, 10, 20):
        found[f"pca {rank}"] = Family("interpolation", pca(rank), "a subspace")
    found["diagonal"] = Family("gaussian-like", mean + normal(count, D) * members.std(0))
    found["full"] = Family("gaussian-like", mean + normal(count, k) @ centred / (k - 1) ** 0.5)
    return found


class Zoo:
    """Members, how families are drawn from them, and what no generator has seen."""

    def __init__(self, kind):
        if kind == "independent":
            everything = independent(K + 150, 1)
            self.members, held_out, self.fresh = everything.split([K, 50, 100])
            self.yardsticks = {"held_out": held_out}
        else:
            whole = runs(K + 20, 1)
            self.members = torch.cat([whole[:20], whole[40:]])
            self.yardsticks = {"held_out": whole[20:40], "second_run": runs(200, 2)[::5]}
            self.fresh = runs(N, 3)
        self.geometry = Geometry(self.members)
        self.families, self.test = draws(self.members, 4), draws(self.members, 5)

        self.known = Known(self.geometry, self.families, self.yardsticks)


@pytest.fixture(scope="module", params=["independent", "runs"])
def zoo(request):
    return Zoo(request.param)


def test_every_known_kind_gets_its_word(zoo):
    for name, family in zoo.test.items():
        found = zoo.known.assess(family.vectors)
        far = found.distances["samples"].nearest > 1
        assert found.word == ("noise" if name.startswith("noise") and far else family.word), (name, found.text)
        assert found.shares[found.word] > 0.9
    assert zoo.known.assess(zoo.fresh).word == "new"


def test_what_is_nearly_a_member_is_a_replica(zoo):
    """Whatever parts it from the member: rounding, noise, or a generator that has learned members nearly by heart."""
    copies = zoo.test["member"].vectors
    centred = zoo.members - zoo.members.mean(0)
    within = torch.randn(N, K, generator=random(7)) @ centred / (K - 1) ** 0.5
    noise = torch.randn(N, D, generator=random(8)) * zoo.members.std()
    for vectors in (
        copies.bfloat16().float(),
        copies.half().float(),
        *(copies + scale * noise for scale in (1e-5, 1e-4, 1e-3, 1e-2)),
        *(copies + scale * within for scale in (1e-4, 1e-3, 1e-2, 0.05, 0.15)),
    ):
        found = zoo.known.assess(vectors)
        assert found.word == "replica", found.text
        assert found.shares["unknown"] < 0.05


def test_points_between_near_neighbours_are_no_copies():
    """Of a run in small steps: what stands halfway between two members is as near to both as they are to each other."""
    steps = torch.arange(300.0)[:, None] * torch.randn(1, D, generator=random(1)) / 300
    members = steps + 0.02 / 300 * torch.randn(300, D, generator=random(2)).cumsum(0)
    geometry = Geometry(members)
    middle = (members[1:-1:2] + members[2::2]) / 2
    place = geometry.place(middle)
    assert (place.nearest < 0.02 * geometry.mean_distance).all()
    copies = geometry.features(members[1:-1:2])
    assert (geometry.features_of(place) - copies).abs().amax(1).min() > 0.5
    torch.testing.assert_close(geometry.features(members[1:-1:2] + 1e-7), copies)


def test_means_hide_nothing(zoo):
    copies, noisy = zoo.test["member"].vectors, zoo.test["noise 0.4"].vectors
    half = zoo.known.assess(torch.cat([copies[:50], zoo.fresh[:50]]))
    assert half.word == "mixture"
    assert half.mixed
    assert half.shares["replica"] == pytest.approx(0.5, abs=0.02)
    assert half.shares["new"] == pytest.approx(0.5, abs=0.05)
    assert set(half.words[:50]) == {"replica"}
    assert half.words[50:].count("new") > 45
    mostly = zoo.known.assess(torch.cat([copies[:80], noisy[:20]]))
    assert mostly.word == "replica"
    assert mostly.families["member"] == pytest.approx(0.8, abs=0.01)


def smoothed(members, seed):
    """What a decoder might make of members: nearer to their mean, and off where members hardly differ."""
    mean, centred = members.mean(0), members - members.mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    error = torch.randn(N, 20, generator=random(seed)) @ v[-20:] * s[0] / len(members) ** 0.5
    return mean + 0.2 * centred[torch.randint(len(members), (N,), generator=random(seed))] + 0.3 * error


def test_what_is_far_from_every_known_kind_is_unknown(zoo):
    """It gets no word of the nearest kind, be it the new networks'; one who knows the kind says what it is."""
    samples = smoothed(zoo.members, 11)
    found = zoo.known.assess(samples)
    assert found.word == "unknown"
    assert found.shares["unknown"] > 0.98
    assert "unknown (the nearest: " in found.headline
    assert any("they are far from every known kind" in one.remedy for one in found.undecided)
    half = zoo.known.assess(torch.cat([samples[:50], zoo.test["member"].vectors[:50]]))
    assert (half.word, half.shares["unknown"]) == ("mixture", pytest.approx(0.5, abs=0.02))
    families = zoo.families | {"decoded": Family("interpolation", smoothed(zoo.members, 12))}
    told = assess(zoo.geometry, samples, families, zoo.yardsticks)
    assert (told.word, told.shares["unknown"]) == ("interpolation", 0)


def test_samples_that_are_all_alike_are_collapsed(zoo):
    mean = zoo.members.mean(0)
    alike = zoo.known.assess(mean + 1e-3 * torch.randn(20, D, generator=random(6)))
    assert alike.collapsed
    assert "collapsed" in alike.text
    assert not zoo.known.assess(zoo.fresh).collapsed
    assert zoo.known.assess(zoo.members[:1].repeat(30, 1)).collapsed


def test_noise_is_a_matter_of_degree(zoo):
    """Some of the members with noise are farther from all members than these are from each other, some are not."""
    distance = (zoo.geometry.mean_distance / D**0.5) / float(zoo.members.std())
    noise = torch.randn(N, D, generator=random(8)) * torch.linspace(0.8, 1.2, N)[:, None]
    found = zoo.known.assess(zoo.members[torch.arange(N) % K] + distance * zoo.members.std() * noise)
    assert found.word in ("replica", "noise")
    assert 0.3 < found.shares["noise"] < 0.7
    assert set(found.words) == {"replica", "noise"}


def test_it_is_json_and_the_same_again(zoo):
    draws_of = {name: Family(f.word, lambda f=f: f.vectors, f.of) for name, f in zoo.families.items()}
    first = assess(zoo.geometry, zoo.fresh, draws_of, zoo.yardsticks)
    assert json.loads(json.dumps(first.to_dict())) == json.loads(json.dumps(zoo.known.assess(zoo.fresh).to_dict()))
    permuted = torch.randperm(N, generator=random(7))
    other = zoo.known.assess(zoo.fresh[permuted])
    assert other.shares == pytest.approx(first.shares, abs=1e-6)
    assert other.words == tuple(first.words[i] for i in permuted)


def test_what_is_measured_is_a_metric(zoo):
    found = zoo.known.assess(zoo.fresh)
    metrics = named_metrics({"groups": [], "verdict": {"shares": found.shares}, "novelty": found.to_dict()})
    assert metrics["generated/share_new"] == found.shares["new"]
    assert metrics["novelty/effective_rank"] == found.effective_rank
    assert metrics["novelty/members_rank"] == found.members_rank
    assert metrics["novelty/spread"] == found.spread
    for name, copying in found.copying.items():
        assert (metrics[f"novelty/c_t_{name}"], metrics[f"novelty/z_{name}"]) == (copying.c_t, copying.z)
    assert found.copying


def test_losses_tell_what_weights_do_not():
    """Where values are independent, a Gaussian per value gives the same weights; not the same networks."""
    members, held_out, fresh = torch.randn(K + 150, D, generator=random(8)).split([K, 50, 100])
    families, geometry = draws(members, 9), Geometry(members)
    good, bad = 0.5 + 0.02 * torch.rand(N, generator=random(1)), 0.7 + 0.02 * torch.rand(N, generator=random(2))
    by_weights = assess(geometry, fresh, families, {"held_out": held_out})
    assert by_weights.certain["new"] < 0.8
    assert any("how many samples are" in one.question for one in by_weights.undecided)
    known = {"held_out": good[:50], "diagonal": bad}
    for losses, word in ((good, "new"), (bad, "gaussian-like")):
        found = assess(geometry, fresh, families, {"held_out": held_out}, losses, known)
        assert (found.word, found.shares[word]) == (word, pytest.approx(1, abs=0.1))
        assert found.shares["replica"] == pytest.approx(by_weights.shares["replica"])


def test_what_cannot_be_decided_is_said():
    members = independent(K, 1)
    samples, few = members[:30], independent(4, 2)
    found = assess(Geometry(members), samples, draws(members, 4), {"held_out": few})
    assert found.word == "replica"
    assert {(one.question, one.n) for one in found.undecided} >= {("whether samples are new", 10)}
    halves = torch.cat([members[:7], members[:3] / 2 + members[3:6] / 2])
    unsure = assess(Geometry(members), halves, draws(members, 4), {}).undecided
    assert any("mixture" in one.question and one.n > 10 for one in unsure)


@pytest.mark.parametrize("members", [torch.ones(1, 5), torch.randn(2, 5, generator=random(1)), torch.ones(9, 5)])
def test_too_few_members_are_no_error(members):
    found = assess(Geometry(members), torch.randn(12, 5, generator=random(2)), {}, {"held_out": torch.zeros(0, 5)})
    assert found.word == "unknown"
    assert found.undecided
    json.dumps(found.to_dict())


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 1), (5, 3), (40, 6)])
def test_features_are_numbers_for_any_zoo(shape):
    members = torch.randn(*shape, generator=random(3))
    for zoo in (members, torch.ones_like(members)):
        geometry = Geometry(zoo)
        vectors = torch.cat([zoo, zoo + 1, zoo.mean(0)[None]])
        features = geometry.features(vectors)
        assert features.shape == (len(vectors), len(geometry.names))
        assert features.isfinite().all()
        assert 0 <= geometry.effective_rank <= min(shape)


def test_geometry_is_what_loops_give(monkeypatch):
    members, vectors = independent(12, 1), torch.cat([independent(5, 2), independent(12, 1)[:3].mean(0)[None]])
    plain = Geometry(members)
    place, features = plain.place(vectors), dict(zip(plain.names, plain.features(vectors).T, strict=True))
    m, x = members.double(), vectors.double()
    torch.testing.assert_close(place.distances, torch.stack([(x - one).norm(dim=1) for one in m], 1))
    torch.testing.assert_close(
        place.cosines, torch.cosine_similarity((x - m.mean(0))[:, None], (m - m.mean(0))[None], dim=2)
    )
    segments = []
    for one in x:
        best = math.inf
        for i in range(12):
            for j in range(i):
                t = ((one - m[i]) @ (m[j] - m[i]) / (m[j] - m[i]).square().sum()).clamp(0, 1)
                best = min(best, float((one - m[i] - t * (m[j] - m[i])).norm()))
        segments.append(best)
    unit = float(torch.pdist(m).mean())
    assert plain.mean_distance == pytest.approx(unit)
    np.testing.assert_allclose(features["nearest segment"], np.log(np.array(segments) / unit + 1e-4), atol=1e-5)
    _, s, v = torch.linalg.svd(m - m.mean(0), full_matrices=False)
    inside = (x - m.mean(0)) @ v[:11].T
    outside = (x - m.mean(0) - inside @ v[:11]).norm(dim=1)
    np.testing.assert_allclose(features["outside span"], np.log(outside.numpy() / unit + 1e-4), atol=1e-6)
    energy = (inside[:, :3].square() / (s[:3].square() / 11)).mean(1).log()
    np.testing.assert_allclose(features["components 1 to 3"], energy, atol=1e-4)
    variance = s.square()
    assert plain.effective_rank == pytest.approx(float(variance.sum() ** 2 / variance.square().sum()))
    monkeypatch.setattr("pdiff_ray.evaluation.geometry.CHUNK_VALUES", 100)  # of columns
    monkeypatch.setattr("pdiff_ray.evaluation.geometry.PAIR_VALUES", 100)
    torch.testing.assert_close(Geometry(members).features(vectors), plain.features(vectors))


def test_data_copying_is_the_papers_statistic():
    members, held_out, fresh = independent(200, 1).split([100, 40, 60])
    geometry = Geometry(members)
    copies = members[:60] + 1e-2 * independent(60, 3)
    yardstick = geometry.place(held_out)
    same, nearer = (data_copying(geometry, geometry.place(x), yardstick) for x in (fresh, copies))
    assert abs(same.z) < 2.5
    assert nearer.z < -5
    assert nearer.cells == 2
    # In one cell, it is the Mann-Whitney U test.
    few = geometry.place(held_out[:15])
    one = data_copying(geometry, geometry.place(fresh), few)
    stats = pytest.importorskip("scipy.stats")
    mine, theirs = (geometry.place(x).nearest.numpy() for x in (fresh, held_out[:15]))
    u = stats.mannwhitneyu(mine, theirs).statistic
    assert one.c_t == pytest.approx((u - 450) / math.sqrt(900 * 76 / 12))


def test_few_members_have_few_cells():
    members, samples, held_out = independent(205, 1).split([5, 100, 100])
    geometry = Geometry(members)
    assert data_copying(geometry, geometry.place(samples), geometry.place(held_out)).cells == 1


def test_neighbours_that_are_alike_count_less():
    independent_values = torch.randn(2000, generator=random(1))
    assert effective_number(independent_values) > 1500
    for memory in (0.5, 0.9):
        value, chain = torch.zeros(()), []
        for noise in torch.randn(4000, generator=random(2)):
            value = memory * value + noise
            chain.append(value)
        worth = effective_number(torch.stack(chain)) / 4000
        assert worth == pytest.approx((1 - memory) / (1 + memory), rel=0.3)
    assert effective_number(torch.arange(50.0)) < 5


def test_equal_distances_are_as_many_values():
    assert effective_number(torch.full((20,), 0.5)) == 20
    alternating = torch.tensor([0.1, 0.2] * 20)
    assert effective_number(alternating) == effective_number(alternating.flip(0)) > 10


def test_a_kind_that_hardly_varies_reaches_as_far_as_its_features_may_move():
    kind = Kind("interpolation", torch.zeros(50, 12) + 1e-6 * torch.randn(50, 12, generator=random(1)))
    assert kind.squares(torch.full((1, 12), 0.09)).item() < kind.reach
