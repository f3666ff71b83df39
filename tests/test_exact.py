"""Exact tasks: the tree is right, the front is the front, and a task that misses its dials refuses to exist."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from paretune.errors import TaskError
from paretune.registry import TASKS, describe
from paretune.seeds import forked_torch, generator
from paretune.tasks.exact import language
from paretune.tasks.exact.language import ReferenceSpec, load_reference
from paretune.tasks.exact.rewards import correlations
from paretune.tasks.exact.task import ExactTask
from paretune.tasks.exact.tree import PrefixTree
from paretune.tasks.preferences import judged_preferences, sample_preferences

TINIEST = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
SMALL = {"alphabet": 4, "length": 3, "prompt_count": 4, "width": 32, "layers": 2}


@pytest.fixture(scope="module")
def task():
    return ExactTask(rho=-0.8, seed=3, **SMALL)


def forward_of(model):
    return lambda ids, mask, positions: model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def test_tree_lists_every_response_once():
    tree = PrefixTree(3, 2)
    listed = [tuple(row[row >= 0]) for row in tree.symbols_RL]
    assert listed == [(), *[(a,) for a in range(3)], *itertools.product(range(3), repeat=2)]
    assert all(tree.index(symbols) == r for r, symbols in enumerate(listed))
    assert PrefixTree(8, 4).responses == 4681


def test_packed_tree_equals_one_forward_per_response(task):
    """A wrong mask, position or parent changes some prefix's logits."""
    model, _ = task.load()
    with torch.no_grad():
        logp_PR = task.logp_PR(forward_of(model), "test").numpy()
        for p, prompt in enumerate(task.prompts("test")):
            for r in generator(0, "responses", p).choice(task.tree.responses, 6, replace=False):
                symbols = [int(s) for s in task.tree.symbols_RL[r] if s >= 0]
                ids = ["abcd".index(c) for c in prompt.text] + symbols
                logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                start = len(prompt.text)
                expected = sum(logp[start + t - 1, s] for t, s in enumerate(symbols))
                if len(symbols) < task.length:
                    expected = expected + logp[-1, task.tree.eos]
                assert logp_PR[p, r] == pytest.approx(float(expected), abs=2e-5)
    np.testing.assert_allclose(np.exp(logp_PR).sum(1), 1.0, atol=1e-12)


def test_samples_agree_with_enumerated_probabilities(task):
    """Chi-square of 4,000 samples drawn symbol by symbol with the model's own generate; false alarm 1e-4."""
    model, tokenizer = task.load()
    prompt = task.prompts("train")[0].text
    with torch.random.fork_rng():
        torch.random.manual_seed(5)  # noqa: TID251 - generate() draws from the global state only
        out = model.generate(
            **tokenizer([prompt] * 4000, return_tensors="pt"), do_sample=True, top_k=0, max_new_tokens=task.length, pad_token_id=4
        )
    texts = tokenizer.batch_decode(out[:, 3:], skip_special_tokens=True)
    where = {text: r for r, text in enumerate(task.responses)}
    count_R = np.bincount([where[t] for t in texts], minlength=task.tree.responses)
    expected_R = 4000 * np.exp(task.reference_logp_PR("train")[0])
    often = expected_R >= 5
    statistic = ((count_R - expected_R)[often] ** 2 / expected_R[often]).sum()
    rest = expected_R[~often].sum()
    statistic += (count_R[~often].sum() - rest) ** 2 / rest
    assert statistic < chi2.ppf(1 - 1e-4, often.sum())


def test_next_logp_inverts_response_logp():
    tree = PrefixTree(3, 3)
    next_PIV = torch.from_numpy(generator(1, "next").normal(size=(2, tree.internal, 4))).log_softmax(-1)
    torch.testing.assert_close(tree.next_logp(tree.response_logp(next_PIV)), next_PIV)


def test_random_policies_never_pass_the_front(task):
    """10,000 policies over all responses, from near the reference to near deterministic; also near the optimum, where a bug would show."""
    rng = generator(2, "policies")
    reference_PR, front = task.reference_logp_PR("train"), task.front("train")
    best_K = (front.points_KM * front.w_KM).sum(1)
    for i in range(10_000):
        start_PR = reference_PR if i % 2 else task_optimum(task, rng.random())
        noise = rng.normal(size=reference_PR.shape) * 10 ** rng.uniform(-4, 1)
        logp_PR = start_PR + noise
        logp_PR -= np.logaddexp.reduce(logp_PR, axis=1, keepdims=True)
        assert (front.w_KM @ task.J_M(logp_PR, "train") <= best_K + 1e-12).all()


def task_optimum(task, w1, cache={}):  # noqa: B006 - a handful of optima, reused
    w1 = round(w1, 1)
    if (task, w1) not in cache:
        cache[task, w1] = task.optimum_logp_PR(np.array([w1, 1 - w1]), "train")
    return cache[task, w1]


def test_the_front_is_closed_form_and_stationary(task):
    """J_w(pi*_w) equals beta * log partition function, and no gradient is left there."""
    for w_M in ([1.0, 0.0], [0.3, 0.7]):
        w_M = np.array(w_M)
        scores_PR = task.reference_logp_PR("train") + task.rewards_PRM("train") @ w_M / task.beta
        value = task.beta * np.logaddexp.reduce(scores_PR, axis=1).mean()
        assert w_M @ task.J_M(task.optimum_logp_PR(w_M, "train"), "train") == pytest.approx(value, abs=1e-12)


def test_sequence_level_mixing_of_optima_is_optimal_and_token_level_is_not(task):
    w_M = np.array([0.45, 0.55])
    mixed_PR = sum(w * task.optimum_logp_PR(e, "train") for w, e in zip(w_M, np.eye(2), strict=True))
    mixed_PR -= np.logaddexp.reduce(mixed_PR, axis=1, keepdims=True)
    np.testing.assert_allclose(mixed_PR, task.optimum_logp_PR(w_M, "train"), atol=1e-9)
    start, best, limit = (
        w_M @ task.J_M(p, "train")
        for p in (
            task.reference_logp_PR("train"),
            task.optimum_logp_PR(w_M, "train"),
            task.composition_limit_logp_PR(w_M, "train"),
        )
    )
    assert (limit - start) / (best - start) < 0.97
    vertex_M = np.eye(2)[0]
    np.testing.assert_allclose(task.composition_limit_logp_PR(vertex_M, "train"), task.optimum_logp_PR(vertex_M, "train"), atol=1e-9)


@pytest.mark.parametrize(("m", "rho"), [(2, 0.8), (2, 0.0), (3, -0.4), (5, 0.3)])
def test_dials_are_met(m, rho):
    task = ExactTask(rho=rho, objective_count=m, seed=1, **SMALL)
    both = np.concatenate([task.rewards_PRM("train"), task.rewards_PRM("test")])
    logp = np.concatenate([task.reference_logp_PR("train"), task.reference_logp_PR("test")])
    off = correlations(both, logp)[~np.eye(m, dtype=bool)] - rho
    assert np.abs(off).max() <= 0.03
    assert both.min() > 0
    assert both.max() < 1
    strengths = np.mean([task.verified()[split]["strength_nats"] for split in ("train", "test")], axis=0)
    np.testing.assert_allclose(strengths, task.strength, atol=1e-3)


def test_correlations_agree_with_numpy(task):
    p_R = np.exp(task.reference_logp_PR("train")[0])
    expected = np.cov(task.rewards_PRM("train")[0].T, aweights=p_R, ddof=0)
    expected = expected[0, 1] / np.sqrt(expected[0, 0] * expected[1, 1])
    found = correlations(task.rewards_PRM("train")[:1], task.reference_logp_PR("train")[:1])
    assert found[0, 1] == pytest.approx(expected, abs=1e-12)


def test_a_policy_that_never_says_most_responses_has_returns(task):
    """0 log 0 is 0: the KL of a policy with one response is the surprisal of that under the reference."""
    logp_PR = np.full_like(task.reference_logp_PR("train"), -np.inf)
    logp_PR[:, 7] = 0.0
    rewards_PM, kl_P = task.returns(logp_PR, "train")
    np.testing.assert_array_equal(rewards_PM, task.rewards_PRM("train")[:, 7])
    np.testing.assert_array_equal(kl_P, -task.reference_logp_PR("train")[:, 7])


def test_score_reads_the_table_and_the_empty_response_counts(task):
    prompts = task.prompts("test")[:3]
    rewards_NM = task.score(prompts, ["", "abc", "d"])
    table = task.rewards_PRM("test")
    np.testing.assert_array_equal(rewards_NM, [table[0, 0], table[1, task.tree.index([0, 1, 2])], table[2, task.tree.index([3])]])


def test_same_dials_same_task_and_prompts_do_not_overlap(task):
    again = ExactTask(rho=-0.8, seed=3, **SMALL)
    np.testing.assert_array_equal(again.rewards_PRM("train"), task.rewards_PRM("train"))
    train, test = ({p.text for p in task.prompts(split)} for split in ("train", "test"))
    assert len(train) == len(test) == 4
    assert not train & test
    other = ExactTask(rho=-0.8, seed=4, **SMALL)
    assert np.abs(other.rewards_PRM("train") - task.rewards_PRM("train")).max() > 0.1


def test_rewards_are_the_same_bits_under_any_number_of_threads():
    """At width 16 two threads add up the reference's logits in another order."""
    dials, bits = {"alphabet": 3, "length": 2, "prompt_count": 2, "width": 16, "layers": 1}, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bits.append(ExactTask(**dials).rewards_PRM("train").tobytes())
        assert torch.get_num_threads() == threads
    assert bits[0] == bits[1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["changed", "empty", "gone", "gone, from before there were hashes"])
def test_a_damaged_reference_in_the_cache_is_made_again(tmp_path, monkeypatch, name, damage):
    """One changed bit of a weight gave another front, and a model without its config took all memory there was."""
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(language, "_pretrain", lambda spec: LlamaForCausalLM(TINIEST).eval())
    spec = ReferenceSpec(alphabet=3, seed=0, width=8, layers=1)
    with forked_torch(0):
        before = load_reference(spec)[0].state_dict()
    language._loaded.cache_clear()
    (folder,) = tmp_path.glob("reference-*")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2] + b" " + content[-1:] if damage == "changed" else b"")
    if damage.startswith("gone"):
        (folder / name).unlink()
    if damage.endswith("hashes"):
        (folder / "DONE").unlink()
    assert not language._is_whole(folder), "else a model without a config would now be loaded, of 27 GB"
    with forked_torch(0), pytest.warns(UserWarning, match="is damaged, and is made again"):
        model, tokenizer = load_reference(spec)
    assert tokenizer.padding_side == "left"
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert (folder / name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("dials", "found", "rule"),
    [
        ({"rho": -0.6, "objective_count": 3}, "rho = -0.6", "between -0.5 and 0.99 for 3 objectives"),
        ({"objective_count": 1}, "objective_count = 1", "between 2 and 8"),
        ({"alphabet": 26, "length": 4}, "456,976", "enumerated"),
        ({"alphabet": 2, "prompt_count": 5}, "5 + 5 prompts", "distinct"),
        ({"beta": 0.0}, "beta = 0", "beta lies between"),
        ({"width": 30}, "width = 30", "a multiple of 8"),
        ({"width": 12}, "width = 12", "each an even number"),
    ],
)
def test_impossible_dials_are_refused_with_the_bound(dials, found, rule):
    with pytest.raises(TaskError) as error:
        ExactTask(**dials)
    assert found in str(error.value)
    assert rule in str(error.value)
    assert error.value.exit_code == 2


def test_a_missed_dial_refuses_to_exist():
    with pytest.raises(TaskError, match="nats from the reference"):
        _ = ExactTask(strength=4.0, **SMALL).rewards_PRM("train")


def test_judged_preferences_are_fixed_and_never_sampled():
    two = judged_preferences(2)
    np.testing.assert_allclose(two[:, 0], [(i + 0.5) / 11 for i in range(11)])
    three = judged_preferences(3)
    assert three.shape == (66, 3)
    for judged in (two, three):
        drawn = sample_preferences(generator(0, "w"), 2000, judged.shape[1])
        assert np.abs(drawn[:, None] - judged[None]).max(-1).min() > 0.005
        np.testing.assert_allclose(drawn.sum(1), 1.0)


def test_described_task_is_built_again(task):
    again = TASKS.build(describe(task))
    assert again == task
