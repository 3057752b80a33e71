"""Draws of timesteps against brute force: the true probability of every outcome."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from statistics import NormalDist

import pytest
import torch

from longsana.flow.timesteps import independent, logit_normal, monotone, monotone_path, score_timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fits(draws: Iterable[Hashable], probability: Mapping[Hashable, float]) -> bool:
    """Pearson's chi-square test at level 0.001; an outcome of no probability never fits."""
    counts = Counter(draws)
    total = sum(counts.values())
    assert sum(probability.values()) == pytest.approx(1)
    assert min(probability.values()) * total > 5, "too few draws for the test"
    if not counts.keys() <= probability.keys():
        return False
    statistic = sum((counts[outcome] - total * p) ** 2 / (total * p) for outcome, p in probability.items())
    freedom = len(probability) - 1
    # The quantile of chi-square by Wilson and Hilferty.
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + NormalDist().inv_cdf(0.999) * spread**0.5) ** 3


def paths(low: int, high: int, length: int) -> list[tuple[int, ...]]:
    """Brute force: every sequence of whole numbers that never falls."""
    every = itertools.product(range(low, high + 1), repeat=length)
    return [path for path in every if list(path) == sorted(path)]


def sorted_draws(low: int, high: int, length: int, rng: torch.Generator) -> torch.Tensor:
    """The fault: independent draws, sorted. Paths without repeats come too often."""
    return torch.randint(low, high + 1, (length,), generator=rng).sort().values.float()


def one_after_another(low: int, high: int, length: int, rng: torch.Generator) -> torch.Tensor:
    """The fault: each step uniform in what the one before leaves. Paths that rise early come too often."""
    steps = []
    for _ in range(length):
        low = int(torch.randint(low, high + 1, (), generator=rng))
        steps.append(low)
    return torch.tensor(steps).float()


GRIDS = [(3, 6, 3), (1, 5, 2), (7, 8, 4), (1, 6, 1)]


def path_fits(sample: Callable[..., torch.Tensor], low: int, high: int, length: int) -> bool:
    rng, every = generator(), paths(low, high, length)
    draws = (tuple(sample(low, high, length, rng).int().tolist()) for _ in range(4000))
    return fits(draws, {path: 1 / len(every) for path in every})


@pytest.mark.parametrize("grid", GRIDS)
def test_every_path_is_equally_likely(grid):
    assert path_fits(monotone_path, *grid)


@pytest.mark.parametrize("grid", GRIDS[:3])
@pytest.mark.parametrize("fault", [sorted_draws, one_after_another])
def test_faulty_paths_are_noticed(grid, fault):
    assert not path_fits(fault, *grid)


def test_paths_with_nothing_to_choose():
    rng = generator()
    assert monotone_path(1, 1000, 0, rng).shape == (0,)
    assert monotone_path(7, 7, 0, rng).shape == (0,)
    assert monotone_path(7, 7, 3, rng).tolist() == [7.0, 7.0, 7.0]
    assert monotone_path(1000, 1000, 2, rng).tolist() == [1000.0, 1000.0]


ANCHOR = 3
# A logit-normal of no width at shift 1: every anchor is 3.
AT_ANCHOR = {"mean": float(torch.logit(torch.tensor(ANCHOR / 1000, dtype=torch.float64))), "std": 0.0, "shift": 1.0}


def lumped(row: Iterable[float]) -> tuple[int, ...]:
    """1, 2 and 3 as they are, all above in three ranges: few outcomes, so that each is drawn often."""
    return tuple(int(t) if t <= ANCHOR else 4 + int(t) // 400 for t in row)


def clip_probabilities(chunks: int) -> dict[Hashable, float]:
    """Brute force over the whole grid: each anchor chunk as likely as another, then each path on either side."""
    probability: Counter[Hashable] = Counter()
    for position in range(chunks):
        left = list(itertools.combinations_with_replacement(range(1, ANCHOR + 1), position))
        right = list(itertools.combinations_with_replacement(range(ANCHOR, 1001), chunks - 1 - position))
        lumps = Counter(lumped(path) for path in right)
        for head, (tail, count) in itertools.product(left, lumps.items()):
            probability[(*head, ANCHOR, *tail)] += count / (len(left) * len(right) * chunks)
    rare = [outcome for outcome, p in probability.items() if p < 1e-3]
    for outcome in rare:
        probability["rare"] += probability.pop(outcome)
    return dict(probability)


def clip_outcomes(clips: torch.Tensor, probability: Mapping[Hashable, float]) -> list[Hashable]:
    assert (clips.diff(dim=1) >= 0).all()
    return [lump if (lump := lumped(row)) in probability else "rare" for row in clips.tolist()]


@pytest.mark.parametrize("chunks", [2, 3])
def test_clips_follow_the_distribution_of_monotone_paths(chunks, monkeypatch):
    probability = clip_probabilities(chunks)

    def draw() -> bool:
        clips = monotone(8000, chunks, **AT_ANCHOR, same_prob=0.0, rng=generator(1))
        return fits(clip_outcomes(clips, probability), probability)

    assert draw()
    if chunks == 3:  # with two chunks a path is one draw, and no sampler of it is wrong
        for fault in (sorted_draws, one_after_another):
            monkeypatch.setattr("longsana.flow.timesteps.monotone_path", fault)
            assert not draw()


def test_clips_have_whole_timesteps_in_range():
    clips = monotone(500, 5, mean=0.0, std=3.0, shift=3.0, same_prob=0.3, rng=generator())
    assert clips.shape == (500, 5)
    assert clips.dtype == torch.float32
    assert torch.equal(clips, clips.round())
    assert clips.min() >= 1 and clips.max() <= 1000
    assert (clips.diff(dim=1) >= 0).all()
    # Were a clip's path not its own, neighbours would agree.
    assert len({tuple(row) for row in clips.tolist()}) > 450


def quartile(t: float, mean: float, std: float, shift: float) -> int:
    """In which quarter of the logit-normal distribution t lies: the sampler, inverted."""
    sigma = t / 1000
    u = sigma / (shift - (shift - 1) * sigma)
    odds = torch.logit(torch.tensor(u, dtype=torch.float64), eps=1e-9)
    return min(3, int(4 * NormalDist(mean, std).cdf(float(odds))))


QUARTERS: dict[Hashable, float] = dict.fromkeys(range(4), 0.25)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (0.5, 0.7, 7.0)])
def test_logit_normal(mean, std, shift):
    t = logit_normal(4000, mean=mean, std=std, shift=shift, rng=generator())
    assert t.shape == (4000,)
    assert t.dtype == torch.float32
    assert torch.equal(t, t.round())
    assert fits((quartile(x, mean, std, shift) for x in t.tolist()), QUARTERS)
    # Each parameter counts.
    assert not fits((quartile(x, mean + 0.2, std, shift) for x in t.tolist()), QUARTERS)
    assert not fits((quartile(x, mean, std * 1.2, shift) for x in t.tolist()), QUARTERS)
    assert not fits((quartile(x, mean, std, shift * 1.2) for x in t.tolist()), QUARTERS)


def test_logit_normal_stays_in_range():
    t = logit_normal(200, mean=0.0, std=1000.0, shift=3.0, rng=generator())
    assert set(t.tolist()) == {1.0, 1000.0}


def test_the_anchor_is_logit_normal():
    settings = {"mean": 0.3, "std": 0.8, "shift": 3.0}
    alone = monotone(4000, 1, **settings, same_prob=0.0, rng=generator())
    assert fits((quartile(x, **settings) for x in alone[:, 0].tolist()), QUARTERS)
    same = monotone(4000, 3, **settings, same_prob=1.0, rng=generator())
    assert torch.equal(same, same[:, :1].expand_as(same))
    assert fits((quartile(x, **settings) for x in same[:, 0].tolist()), QUARTERS)


PUBLISHED = {"mean": 0.0, "std": 1.0, "shift": 3.0, "same_prob": 0.0}


def test_paths_are_drawn_before_the_shift():
    """Medians of three chunks as measured on the published sampler, 40,000 draws (method.md 7.2)."""
    medians = (monotone(40_000, 3, **PUBLISHED, rng=generator()) / 1000).median(dim=0).values.tolist()
    assert medians == pytest.approx([0.51, 0.75, 0.90], abs=0.008)
    # Paths among shifted timesteps, the fault, lie elsewhere.
    assert all(abs(own - wrong) > 0.015 for own, wrong in zip(medians, [0.41, 0.72, 0.87], strict=True))


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_the_shift_changes_no_order(shift):
    """The same draws without a shift, shifted: quantiles of a path do not depend on what comes after it."""
    plain, shifted = (
        monotone(500, 3, **{**PUBLISHED, "shift": s}, rng=generator(2)).double() / 1000 for s in (1, shift)
    )
    assert torch.equal((shift * plain / (1 + (shift - 1) * plain) * 1000).round().clamp(1, 1000), 1000 * shifted)


def test_uniform_chunks_draw_timesteps_of_their_own():
    clips = independent(20_000, 3, **PUBLISHED, rng=generator())
    settings = {name: PUBLISHED[name] for name in ("mean", "std", "shift")}
    for chunk in range(3):
        assert fits((quartile(x, **settings) for x in clips[:, chunk].tolist()), QUARTERS)
    quarters = torch.tensor([[quartile(x, **settings) for x in row] for row in clips[:, :2].tolist()])
    pairs = {(a, b): 1 / 16 for a in range(4) for b in range(4)}
    assert fits((tuple(row) for row in quarters.tolist()), pairs)
    same = independent(500, 3, **{**PUBLISHED, "same_prob": 1.0}, rng=generator())
    assert torch.equal(same, same[:, :1].expand_as(same))
    assert len(set(same[:, 0].tolist())) > 200


@pytest.mark.parametrize("sampler", [monotone, independent])
@pytest.mark.parametrize("same_prob", [0.2, 0.7])
def test_share_of_clips_with_one_timestep(same_prob, sampler):
    clips = sampler(4000, 6, mean=0.0, std=1.0, shift=3.0, same_prob=same_prob, rng=generator())
    same = (clips == clips[:, :1]).all(1).tolist()  # by chance: less than once in a thousand
    assert fits(same, {True: same_prob, False: 1 - same_prob})


@pytest.mark.parametrize(("first", "last"), [(0, 1000), (727, 889), (0, 30), (999, 1000)])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_score_timesteps(first, last, shift):
    low, high = 20, 980
    t = score_timesteps(6000, shift=shift, low=low, high=high, rng=generator(), first=first, last=last)
    assert t.shape == (6000,)
    assert t.dtype == torch.float32
    probability: Counter[Hashable] = Counter()
    for n in range(first, last):  # brute force over every draw
        shifted = 1000 * shift * n / (1000 + (shift - 1) * n)
        probability[float(min(max(round(shifted), low), high))] += 1 / (last - first)
    assert set(t.tolist()) <= probability.keys()
    if len(probability) > 1:
        groups = {value: min(9, 10 * i // len(probability)) for i, value in enumerate(sorted(probability))}
        of_group: Counter[Hashable] = Counter()
        for value, p in probability.items():
            of_group[groups[value]] += p
        assert fits((groups[value] for value in t.tolist()), of_group)


def test_score_timesteps_that_clamp():
    """At shift 5 there are 5 of 1000 draws at the lower bound and 92 at the upper (method.md 7.3)."""
    t = score_timesteps(20000, shift=5.0, low=20, high=980, rng=generator())
    shares = {"low": 0.005, "high": 0.092, "between": 0.903}
    assert fits(("low" if x == 20 else "high" if x == 980 else "between" for x in t.tolist()), shares)


@pytest.mark.parametrize("bounds", [{"first": 5, "last": 5}, {"last": 1001}, {"low": 0}, {"low": 900, "high": 800}])
def test_empty_ranges_are_refused(bounds):
    with pytest.raises(AssertionError):
        score_timesteps(1, **{"shift": 5.0, "low": 20, "high": 980, **bounds}, rng=generator())


def test_draws_are_a_function_of_the_generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    draws: list[Callable[[torch.Generator], torch.Tensor]] = [
        lambda rng: logit_normal(8, mean=0.0, std=1.0, shift=3.0, rng=rng),
        lambda rng: monotone(8, 3, mean=0.0, std=1.0, shift=3.0, same_prob=0.5, rng=rng),
        lambda rng: score_timesteps(8, shift=5.0, low=20, high=980, rng=rng),
    ]
    for draw in draws:
        assert torch.equal(draw(generator(3)), draw(generator(3)))
        assert not torch.equal(draw(generator(3)), draw(generator(4)))
    assert torch.equal(torch.random.get_rng_state(), before)
