"""The sampler against a float64 brute force, against transformers' processors, and against the definition of Philox."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.errors import NonFiniteError, UsageError
from llmctl.core.infer.penalties import History, penalise
from llmctl.core.infer.sampler import SamplingParams, log_softmax, probabilities, sample, stream_key, uniform_at


def brute_force(logits: np.ndarray, params: SamplingParams, prompt: list[int] = [], answer: list[int] = []) -> list[float]:  # noqa: B006
    """The distribution, written down from the definitions with Python floats and sorting."""
    scores = [float(x) for x in logits]
    for token in set(prompt) | set(answer):
        scores[token] = scores[token] * params.repetition_penalty if scores[token] < 0 else scores[token] / params.repetition_penalty
    for token in set(answer):
        scores[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    if params.temperature == 0:
        return [float(i == scores.index(max(scores))) for i in range(len(scores))]
    kept = set(range(len(scores)))
    if params.top_k is not None:
        kth = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        kept = {i for i in kept if scores[i] >= kth}
    top = max(scores)
    weights = {i: math.exp((scores[i] - top) / params.temperature) for i in kept}
    total = math.fsum(weights.values())
    if params.top_p is not None:
        before = 0.0
        chosen = set()
        for i in sorted(kept, key=lambda i: (-weights[i], i)):
            if before < params.top_p * total:
                chosen.add(i)
            before += weights[i]
        kept = chosen
    if params.min_p is not None:
        best = max(weights[i] for i in kept)
        kept = {i for i in kept if weights[i] >= params.min_p * best}
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.sampled_from([0.05, 0.37, 0.83, 0.999, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
)


@settings(max_examples=150, deadline=None)
@given(params_strategy, st.integers(0, 2**32 - 1))
def test_distribution_equals_brute_force(params: SamplingParams, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=37) * 4
    prompt, answer = rng.integers(0, 37, 8).tolist(), rng.integers(0, 37, 6).tolist()
    history = History(prompt)
    for token in answer:
        history.add(token)
    ours = probabilities(logits, params, history=history)
    np.testing.assert_allclose(ours, brute_force(logits, params, prompt, answer), atol=1e-12)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99999])
def test_nucleus_of_a_large_vocabulary_equals_a_full_sort(top_p: float) -> None:
    logits = np.random.default_rng(5).normal(size=20_000) * 1.5
    params = SamplingParams(top_p=top_p)
    np.testing.assert_allclose(probabilities(logits, params), brute_force(logits, params), atol=1e-14)


def test_ties_top_k_keeps_all_of_them_and_top_p_the_lowest_ids() -> None:
    logits = np.zeros(1000)
    assert np.count_nonzero(probabilities(logits, SamplingParams(top_k=3))) == 1000
    assert np.flatnonzero(probabilities(logits, SamplingParams(top_p=0.25))).tolist() == list(range(250))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=20),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(repetition_penalty=1.4),
        SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
    ],
)
def test_equal_to_the_processors_of_transformers(params: SamplingParams) -> None:
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(11).normal(size=500).astype(np.float32) * 3
    prompt = [3, 17, 17, 250, 499, 0]
    scores = torch.tensor(logits)[None]
    ids = torch.tensor([prompt])
    chain = [
        logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        logits_process.TemperatureLogitsWarper(params.temperature),
    ]
    if params.top_k is not None:
        chain.append(logits_process.TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        chain.append(logits_process.TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        chain.append(logits_process.MinPLogitsWarper(params.min_p))
    for processor in chain:
        scores = processor(ids, scores)
    theirs = torch.softmax(scores[0].double(), dim=-1).numpy()
    ours = probabilities(logits, params, history=History(prompt))
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_inverse_cdf_gives_each_token_exactly_its_interval() -> None:
    """Uniforms on a fine grid hit token i as often as its probability says, up to one grid point at each border."""
    logits = np.log(np.array([0.125, 0.5, 0.0625, 0.3125]))
    grid = [(i + 0.5) / 4096 for i in range(4096)]
    counts = np.bincount([sample(logits, SamplingParams(), u) for u in grid], minlength=4)
    assert np.abs(counts - np.array([512, 2048, 256, 1280])).max() <= 1
    assert [sample(logits, SamplingParams(), u) for u in (0.0, 1 - 2**-53)] == [0, 3]


def test_a_filtered_token_is_never_drawn_even_at_the_ends() -> None:
    logits = np.array([-np.inf, 1.0, 5.0, 5.0, -np.inf], dtype=np.float32)
    drawn = {sample(logits, SamplingParams(top_k=2), u) for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)}
    assert drawn == {2, 3}
    assert {sample(logits, SamplingParams(temperature=3), u) for u in (0.0, 1 - 2**-53)} == {1, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    assert sample(logits, SamplingParams(temperature=temperature), 0.999) == 1


def test_greedy_takes_the_lowest_of_tied_ids() -> None:
    assert sample(np.array([0.0, 2.0, 2.0]), SamplingParams(temperature=0), 0.9) == 1


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        sample(np.array(bad, dtype=np.float32), SamplingParams(temperature=temperature), 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"top_k": 0},
        {"top_k": 1.5},
        {"temperature": True},
        {"temperature": "hot"},
        {"repetition_penalty": 0.0},
    ],
)
def test_parameters_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_penalties_count_the_answer_but_not_the_prompt() -> None:
    history = History([1, 2])
    for token in (2, 3, 3):
        history.add(token)
    logits = penalise(np.zeros(5, dtype=np.float32), 1.0, 0.5, 0.25, history)
    assert logits.tolist() == [0.0, 0.0, -0.75, -1.0, 0.0]
    signs = penalise(np.array([1.0, 1.0, -1.0, 0.0, 1.0], dtype=np.float32), 2.0, 0.0, 0.0, history)
    assert signs.tolist() == [1.0, 0.5, -2.0, 0.0, 1.0]


def test_log_softmax_against_the_formula() -> None:
    logits = np.array([[800.0, 799.0], [-1.0, 3.0]])
    expected = [[x - (max(row) + math.log(sum(math.exp(y - max(row)) for y in row))) for x in row] for row in logits.tolist()]
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-12)


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The ten rounds of Salmon et al. 2011, in Python integers."""
    mask = 2**64 - 1
    for number in range(10):
        if number:
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [(second >> 64) ^ counter[1] ^ key[0], second & mask, (first >> 64) ^ counter[3] ^ key[1], first & mask]
    return counter


def test_philox_oracle_gives_the_published_vectors() -> None:
    """Known answers of Random123 1.14 (kat_vectors, philox4x64 10)."""
    assert philox_4x64_10([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize(("seed", "key", "index"), [(0, 0, 0), (2**64 - 1, 7, 3), (12345, 2**63, 10**6), (2**64 - 1, 2**64 - 1, 2**64 - 1)])
def test_uniforms_are_philox_of_seed_item_and_token(seed: int, key: int, index: int) -> None:
    count = index + 1  # numpy counts up before it makes a block
    word = philox_4x64_10([count % 2**64, count // 2**64, 0, 0], [seed, key])[0]
    assert uniform_at(seed, key, index) == (word >> 11) / 2**53
    theirs = np.random.Philox(key=np.array([seed, key], np.uint64), counter=np.array([index, 0, 0, 0], np.uint64))
    assert uniform_at(seed, key, index) == np.random.Generator(theirs).random()


def test_streams_differ_by_item_sample_and_type() -> None:
    keys = [stream_key(*name) for name in itertools.product([1, 2, "1", "né"], [0, 1])]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
