"""Sampling: the right distribution, the right log-probabilities, and random numbers that the batch cannot touch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine.noise import gumbel, sample_seed
from rollout.engine.sampler import kept, lowest_argmax, sample
from rollout.request import SamplingParams

CPU = torch.device("cpu")


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | fields))  # type: ignore[arg-type]


def test_noise_is_a_function_of_seed_position_and_token_alone() -> None:
    together = gumbel([3, 9, 3], [5, 5, 6], 50, CPU)
    assert torch.equal(together[1], gumbel([9], [5], 50, CPU)[0])
    assert torch.equal(together[2, :20], gumbel([3], [6], 20, CPU)[0])
    assert not torch.equal(together[0], together[2])


def split_mix_64(state: int) -> int:
    """The published generator's next output after `state`; from state 0 it is 0xE220A8397B1DCDAF."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_noise_is_the_published_generators() -> None:
    assert split_mix_64(0) == 0xE220A8397B1DCDAF
    golden = 0x9E3779B97F4A7C15
    for seed, position, token in ((0, 0, 0), (2**63 - 1, 4095, 151_935), (12, 3, 7)):
        key = split_mix_64(split_mix_64(seed - golden) + (position - 1) * golden)
        bits = split_mix_64(key + token * golden) >> 32
        expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
        assert gumbel([seed], [position], token + 1, CPU)[0, token].item() == pytest.approx(expected, abs=1e-5)


def test_noise_is_gumbel_distributed() -> None:
    """Mean and variance of the standard Gumbel are Euler's constant and pi^2 / 6; over 400,000 draws their errors are
    below 0.002 and 0.004."""
    noise = gumbel(range(400), [7] * 400, 1000, CPU).double()
    assert abs(noise.mean().item() - 0.5772156649) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    assert torch.isfinite(noise).all()


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = 20_000
    rows = sample(logits.expand(draws, 4), [params(temperature=0.7)] * draws, list(range(draws)), [3] * draws)
    share = torch.bincount(torch.tensor([row.token_id for row in rows if row is not None]), minlength=4) / draws
    expected = torch.softmax(logits[0] / 0.7, dim=0)
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / draws)


@given(st.integers(0, 2**31), st.floats(0.1, 3.0), st.sampled_from([None, 1, 3]), st.sampled_from([0.3, 0.9, 1.0]))
def test_logprobs_are_of_the_cut_distribution_and_of_the_models_own(
    seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(seed)) * 3
    chosen = params(temperature=temperature, top_k=top_k, top_p=top_p)
    for row, outcome in enumerate(sample(logits, [chosen] * 4, [seed] * 4, list(range(4)))):
        assert outcome is not None
        probability = torch.softmax(logits[row].double() / temperature, dim=0)
        order = probability.argsort(descending=True)
        cut = order[: top_k or 11]
        mass = probability[cut] / probability[cut].sum()
        cut = cut[(mass.cumsum(0) - mass) < top_p]
        assert outcome.token_id in cut.tolist()
        expected = (probability[outcome.token_id] / probability[cut].sum()).log().item()
        assert outcome.logprob == pytest.approx(expected, abs=1e-4)
        own = torch.log_softmax(logits[row].double(), dim=0)[outcome.token_id].item()
        assert outcome.model_logprob == pytest.approx(own, abs=1e-5)


def test_a_row_alone_samples_what_it_samples_in_a_batch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mixed = [
        params(temperature=t, top_p=p, top_k=k)
        for t, p, k in (
            (1.0, 1.0, None),
            (0.0, 1.0, None),
            (0.5, 0.5, None),
            (2.0, 0.9, 5),
            (1.0, 1.0, 1),
            (0.0, 0.1, 2),
        )
    ]
    together = sample(logits, mixed, range(6), range(10, 16))
    for row in range(6):
        (alone,) = sample(logits[row : row + 1], [mixed[row]], [row], [10 + row])
        assert alone is not None
        assert together[row] is not None
        assert alone.token_id == together[row].token_id
        assert alone.logprob == pytest.approx(together[row].logprob, abs=1e-6)


def test_greedy_takes_the_lowest_id_on_ties_and_is_certain_of_it() -> None:
    (outcome,) = sample(torch.tensor([[1.0, 5.0, 5.0, 5.0]]), [params(temperature=0.0)], [0], [0])
    assert outcome is not None
    assert (outcome.token_id, outcome.logprob) == (1, 0.0)
    assert outcome.model_logprob == pytest.approx(-math.log(3 + math.exp(-4)), abs=1e-6)
    assert lowest_argmax(torch.tensor([[0.0, 0.0], [-1.0, 2.0]])).tolist() == [0, 1]


def test_top_k_keeps_ties_and_top_p_keeps_at_least_one() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0]])
    keep = kept(logits, [params(top_k=2), params(top_p=1e-6)])
    assert keep.tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_cannot_be_sampled_from_are_told_apart(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0], [-math.inf] * 3])
    outcomes = sample(logits, [params(), params(temperature=0.0), params()], [1, 2, 3], [0, 0, 0])
    assert [outcome is None for outcome in outcomes] == [True, False, True]


def test_the_kept_ids_of_a_row_do_not_depend_on_the_others() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(2, 3)
    (alone,) = sample(logits[:1], [params(return_kept=True)], [1], [0])
    beside, _ = sample(logits, [params(return_kept=True), params(top_k=1)], [1, 1], [0, 0])
    assert alone is not None
    assert beside is not None
    assert alone.kept is not None
    assert beside.kept is not None
    assert alone.kept.tolist() == beside.kept.tolist() == [0, 2]


def test_a_prompts_samples_have_seeds_of_their_own() -> None:
    assert len({sample_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500
    assert sample_seed(1, 0) == sample_seed(1, 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-39}, "temperature is 1e-39, must be 0, or from 1e-05 up"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        params(**fields)
