"""What an explanation promises: parts that sum to the log-ratio, each from its own formula, and slopes that autograd confirms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from oracles import small_task
from paretune.cli import app
from paretune.errors import ConfigError
from paretune.evaluation.explain import END, explain, sensitivity
from paretune.policy.base import build_mixing
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rules import Identity, Nearest
from paretune.registry import GATE_RULES, METHODS
from paretune.report.page import sensitivity_table, token_table, visible, write_explanation
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import quick_learner, train_plan
from paretune.training.learners.exact import enumerated_returns
from paretune.types import Objectives
from tiny_models import dense_soup, llama, peft_logits, some_ids, write_adapters

W = {"a": 0.5, "b": 0.3, "c": 0.2}
G = [0.5, 0.3, 0.2]


class Letters:
    """A tokenizer of the 17 symbols of the tiny models: a to p, and the end."""

    eos_token_id = pad_token_id = 16
    bos_token_id = None
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 97 for c in text]}

    def decode(self, ids, **_):
        return "".join(chr(97 + i) if i < 16 else "" for i in ids)

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_adapters(llama, tmp_path_factory.mktemp("experts"), [{}, {}, {}])


def family(level, paths, rule=None, make=llama):
    names = tuple("abcdefgh"[: len(paths)])
    objectives = Objectives(names=names, low=(0.0,) * len(names), high=(1.0,) * len(names))
    policy = build_mixing(level, LoraBank.load(make(), paths), Letters())
    return Family(policy, rule or Identity(), objectives, {"model": "none"}, max_new_tokens=6)


def logp(logits_1TV, ids_1T, length):
    """(T,) of the last `length` tokens of `ids_1T`."""
    logp_TV = logits_1TV[0].detach().double().log_softmax(-1)[-length - 1 : -1]
    return logp_TV.gather(1, ids_1T[0, -length:, None])[:, 0].numpy()


def known(paths, response="cafe", prompt="bad"):
    """(T,) reference and (T, K) experts by PEFT itself, and the ids; the response ends."""
    ids = torch.tensor([[ord(c) - 97 for c in prompt + response] + [16]])
    with torch.no_grad():
        reference_T = logp(llama()(input_ids=ids).logits, ids, len(response) + 1)
    return ids, reference_T, np.stack([logp(peft_logits(llama, path, ids), ids, len(response) + 1) for path in paths.values()], 1)


def test_logit_mixing_is_split_into_weighted_log_ratios_and_a_normalizer(paths):
    """Every term against PEFT's own experts; the normalizer from the whole vocabulary, not from what is left over."""
    ids, reference_T, experts_TK = known(paths)
    (found,) = explain(family("logit", paths), "bad", W, response="cafe")
    assert found.how == "product"
    assert found.tokens_T == ("c", "a", "f", "e", END)
    assert found.response == "cafe"
    assert found.reference_T == pytest.approx(reference_T, abs=1e-5)
    assert found.opinion_TK == pytest.approx(experts_TK - reference_T[:, None], abs=1e-4)
    assert found.contribution_TK == pytest.approx(np.array(G) * (experts_TK - reference_T[:, None]), abs=1e-4)
    full = sum(g * peft_logits(llama, path, ids).double().log_softmax(-1) for g, path in zip(G, paths.values(), strict=True))
    assert found.normalizer_T == pytest.approx(-full.logsumexp(-1)[0, -6:-1].numpy(), abs=1e-4)
    assert found.normalizer_T.min() > 1e-4, "with weights as gates it lifts, and here the experts do disagree"
    assert found.remainder_T == pytest.approx(np.zeros(5), abs=1e-4)
    assert found.contribution_TK.sum(1) + found.normalizer_T == pytest.approx(found.logp_T - reference_T, abs=1e-4)


@dataclasses.dataclass(frozen=True)
class Twice(Identity):
    def gates(self, w_WM):
        return 2 * super().gates(w_WM)


def test_gates_that_do_not_sum_to_1_keep_the_identity(paths):
    (found,) = explain(family("logit", paths, Twice()), "bad", W, response="cafe")
    assert found.gates_K == pytest.approx(2 * np.array(G))
    assert found.remainder_T == pytest.approx(np.zeros(5), abs=1e-4)


def test_hidden_states_are_a_product_where_the_head_is_linear_and_shapley_where_it_is_not(paths):
    (logit,), (hidden,) = (explain(family(level, paths), "bad", W, response="cafe") for level in ("logit", "hidden"))
    assert hidden.how == "product"
    assert hidden.contribution_TK == pytest.approx(logit.contribution_TK, abs=1e-4)

    class Capped(torch.nn.Linear):
        def forward(self, x):
            return 0.3 * torch.tanh(super().forward(x) / 0.3)

    def make():
        model = llama()
        head = Capped(32, 17, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
        return model

    (capped,) = explain(family("hidden", paths, make=make), "bad", W, response="cafe")
    assert capped.how == "shapley"
    assert capped.remainder_T == pytest.approx(np.zeros(5), abs=1e-5)


def test_the_path_of_a_soup_sums_to_the_log_ratio(paths):
    """Completeness, and the integrand against finite differences of merged copies that share no code with the bank."""
    ids, reference_T, _ = known(paths)
    (found,) = explain(family("parameter", paths), "bad", W, response="cafe")
    assert found.how == "path"
    with torch.no_grad():
        whole_T = logp(dense_soup(llama, paths, torch.tensor(G))(input_ids=ids).logits, ids, 5)
    assert found.logp_T == pytest.approx(whole_T, abs=1e-4)
    assert found.contribution_TK.sum(1) == pytest.approx(whole_T - reference_T, abs=2e-3)
    assert found.remainder_T == pytest.approx(whole_T - reference_T - found.contribution_TK.sum(1), abs=1e-4)
    h, steps = 0.01, (np.arange(20) + 0.5) / 20
    for k in (0, 2):
        slopes = []
        for s in steps:
            up, down = (torch.tensor(G) * s + sign * h * torch.eye(3)[k] for sign in (1, -1))
            with torch.no_grad():
                one, two = (logp(dense_soup(llama, paths, g)(input_ids=ids).logits, ids, 5) for g in (up, down))
            slopes.append((one - two) / (2 * h))
        assert found.contribution_TK[:, k] == pytest.approx(G[k] * np.mean(slopes, 0), abs=5e-3)


def test_an_adapter_that_adds_nothing_moves_nothing(paths):
    (found,) = explain(family("parameter", paths), "bad", {"a": 1.0}, response="c")
    assert np.abs(found.contribution_TK[:, 1:]).max() == 0
    assert found.contribution_TK[:, 0] == pytest.approx(found.ratio_T, abs=2e-3)
    assert found.opinion_TK[:, 0] == pytest.approx(found.ratio_T, abs=1e-5)


@pytest.mark.parametrize(
    "level", ["factor", {"name": "hidden-layer", "layer": 1}, {"name": "robust", "radius": 0.5}, "merged", "divergence"]
)
def test_shapley_values_are_means_over_all_orders(paths, level):
    made = family(level, paths)
    (found,) = explain(made, "bad", W, response="cafe")
    assert found.how == "shapley"
    assert found.remainder_T == pytest.approx(np.zeros(5), abs=1e-5)
    ids, reference_T, _ = known(paths)
    soup = level == "factor"

    def worth(group):
        if not group:
            return reference_T
        gates = torch.tensor([[g if k in group else 0.0 for k, g in enumerate(G)]])
        with torch.no_grad():
            return logp(made.policy.forward(ids, gates_NK=gates if soup else gates / gates.sum()), ids, 5)

    want_TK = np.zeros((5, 3))
    for order in itertools.permutations(range(3)):
        for place, k in enumerate(order):
            want_TK[:, k] += (worth(set(order[: place + 1])) - worth(set(order[:place]))) / 6
    assert found.contribution_TK == pytest.approx(want_TK, abs=1e-4)


def test_it_explains_the_responses_that_sample_gives(paths):
    made = family("logit", paths)
    found = explain(made, "bad", W, n=3, seed=5)
    assert [e.response for e in found] == made.sample(["bad"], W, n=3, seed=5)[0]
    assert len({e.response for e in found}) > 1
    assert all(len(e.tokens_T) == len(e.logp_T) <= 6 for e in found)
    ended = [e for e in found if e.tokens_T[-1] == END]
    assert all(END not in e.tokens_T[:-1] for e in found)
    assert all(e.response == "".join(e.tokens_T[:-1]) for e in ended)


def test_without_adapters_nothing_was_moved():
    task = small_task()
    reference = METHODS.build("reference").policy(task, quick_learner(), {}, 0)
    (found,) = explain(reference, "abc", "objective_1=.5,objective_2=.5", response="ab")
    assert found.contribution_TK.shape == (3, 0)
    assert found.ratio_T == pytest.approx(np.zeros(3), abs=1e-6)


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def test_what_cannot_be_explained(paths, tmp_path):
    made = family("logit", paths)
    made.max_new_tokens = None
    with refused("responses have a longest length", "no max_new_tokens"):
        explain(made, "bad", W)
    many = write_adapters(llama, tmp_path, [{"r": 1}] * 9)
    made = family("factor", {f"e{k}": many[f"e{k}"] for k in range(9)}, Ninths())
    with refused("every group of adapters is evaluated, for at most 8", "9 adapters with a gate"):
        explain(made, "bad", [1 / 8] * 8, response="a")


def test_a_sharp_path_gets_more_points(tmp_path, monkeypatch):
    """Adapters that outweigh the model: 16 points miss by a tenth of a nat; it goes on until the sum is right, or says what is missing."""
    import paretune.evaluation.explain

    sharp = write_adapters(llama, tmp_path, [{}, {}], scale=0.5)
    made = family("parameter", sharp)
    (found,) = explain(made, "bad", {"a": 0.6, "b": 0.4}, response="cafe")
    assert np.abs(found.remainder_T).max() < 1e-3
    monkeypatch.setattr(paretune.evaluation.explain, "MOST_POINTS", 16)
    (found,) = explain(made, "bad", {"a": 0.6, "b": 0.4}, response="cafe")
    assert np.abs(found.remainder_T).max() > 1e-3
    assert found.contribution_TK.sum(1) + found.remainder_T == pytest.approx(found.ratio_T)


@dataclasses.dataclass(frozen=True)
class Ninths(Identity):
    def gates(self, w_WM):
        return np.full((len(w_WM), 9), 1 / 9)


# Sensitivity


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.3, objective_count=3)


@pytest.fixture(scope="module")
def done(task, tmp_path_factory):
    return train_plan(METHODS.build("experts"), task, quick_learner(steps=20), tmp_path_factory.mktemp("artifacts"), seed=0)


@pytest.mark.parametrize("mixing", ["parameter", "logit"])
@pytest.mark.parametrize("w", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0)])
def test_slopes_are_those_of_autograd(task, done, mixing, w):
    made = METHODS.build({"name": "experts", "mixing": mixing}).policy(task, quick_learner(steps=20), done, 0)
    found = sensitivity(task, made, w)
    gates_K = torch.tensor(w, requires_grad=True)
    rewards_PM, kl_P = enumerated_returns(made.policy, task, gates_K.repeat(task.prompt_count, 1))[:2]
    J_M = (rewards_PM - task.beta * kl_P[:, None]).mean(0)
    gradient_MK = torch.stack([torch.autograd.grad(J, gates_K, retain_graph=True)[0] for J in J_M]).numpy()
    want_MM = np.stack([gradient_MK @ (np.eye(3)[j] - w) for j in range(3)], 1)
    assert found.returns_M == pytest.approx(J_M.detach().numpy(), abs=1e-6)
    assert found.slope_MM == pytest.approx(want_MM, abs=2e-3)
    assert np.abs(want_MM).max() > 0.05
    assert found.slope_MM @ np.array(w) == pytest.approx(np.zeros(3), abs=2e-3)
    assert np.isnan(found.error_MM).all()


class NotExact(ExactTask):
    registered_name = "not-exact-explained"
    is_exact = False


def test_sampled_slopes_share_their_noise(task, done):
    """Within 4.5 standard errors of the exact ones (nine slopes: false alarm below 1e-4), and closer than unpaired samples could be."""
    made = METHODS.build("experts").policy(task, quick_learner(steps=20), done, 0)
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    exact = sensitivity(task, made, (0.5, 0.3, 0.2), step=0.2)
    drawn = sensitivity(blind, made, (0.5, 0.3, 0.2), step=0.2, samples=400, seed=3)
    assert not drawn.exact
    assert (np.abs(drawn.slope_MM - exact.slope_MM) < 4.5 * drawn.error_MM).all()
    assert drawn.slope_MM == pytest.approx(sensitivity(blind, made, (0.5, 0.3, 0.2), step=0.2, samples=400, seed=3).slope_MM, abs=0)
    spread = np.sqrt(2 / 400) * 0.2 / (2 * 0.2 * 0.5)  # of unpaired rewards with a standard deviation of 0.2 that is low for [0, 1]
    assert np.median(drawn.error_MM) < spread


def test_families_that_answer_in_steps_say_so(task, done):
    made = METHODS.build("experts").policy(task, quick_learner(steps=20), done, 0)
    made.rule = Nearest(points_KM=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    found = sensitivity(task, made, (0.6, 0.3, 0.1))
    assert found.stepwise
    assert np.abs(found.slope_MM).max() == 0


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "best", "returns_KM": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))},
        {"name": "pooled", "gates_GK": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.5)), "returns_GM": ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0))},
    ],
    ids=lambda rule: rule["name"],
)
def test_the_defaults_of_ols_and_static_gates_answer_in_steps(task, done, rule):
    made = METHODS.build("experts").policy(task, quick_learner(steps=20), done, 0)
    made.rule = GATE_RULES.build(rule)
    found = sensitivity(task, made, (0.6, 0.3, 0.1))
    assert found.stepwise
    assert np.abs(found.slope_MM).max() == 0
    made.rule = Identity()
    assert not sensitivity(task, made, (0.6, 0.3, 0.1)).stepwise


# Faces


def test_tables_and_json_show_the_same_numbers(paths):
    (found,) = explain(family("logit", paths), "bad", W, response="cafe")
    rows = token_table(found).rows
    assert [row["token"] for row in rows] == ["c", "a", "f", "e", END, "sum"]
    assert rows[-1]["ratio"] == pytest.approx(found.ratio_T.sum())
    parts = rows[0]["expert_0"] + rows[0]["expert_1"] + rows[0]["expert_2"] + rows[0]["normalizer"] + rows[0]["remainder"]
    assert parts == pytest.approx(rows[0]["ratio"])
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["contribution_TK"][1] == pytest.approx(found.contribution_TK[1])
    assert data["sum"]["ratio"] == pytest.approx(rows[-1]["ratio"])
    assert visible(" a\n") == "\N{OPEN BOX}a\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def test_the_page_needs_no_network_and_escapes_what_models_say(paths, task, done, tmp_path):
    made = family("logit", paths)
    (found,) = explain(made, "bad", W, response="cafe")
    found = dataclasses.replace(found, prompt="<script>alert(1)</script>", tokens_T=("<b>", *found.tokens_T[1:]))
    experts = METHODS.build("experts").policy(task, quick_learner(steps=20), done, 0)
    slopes = sensitivity(task, experts, (0.5, 0.3, 0.2))
    page = write_explanation(tmp_path / "new" / "page.html", [found], slopes, family=made).read_text()
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert not re.search(r"https?://", page)
    strips = re.findall(r'<div class="token" title="([^"]*)">', page)
    assert len(strips) == 5
    assert page.count("<rect") == 5 * 4  # three experts and the normalizer
    tables = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert token_table(found).columns[1].show(found.ratio_T[0]) in tables
    assert sensitivity_table(slopes).columns[2].show(slopes.slope_MM[0, 0]) in tables


def test_the_command(task, done, tmp_path):
    runner = CliRunner()
    METHODS.build("experts").policy(task, quick_learner(steps=20), done, 0).save(tmp_path / "family")
    command = ["explain", str(tmp_path / "family"), "abc", "--preference", "objective_1=.7,objective_2=.3"]
    page = tmp_path / "page.html"
    result = runner.invoke(app, [*command, "--n", "2", "--json", "--html", str(page)])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert len(data["explanations"]) == 2
    assert len(data["sensitivity"]["slope_MM"]) == 3
    assert page.is_file()
    shown = runner.invoke(app, [*command, "--response", "ab"])
    assert "expert-objective_1" in shown.stdout
    assert "towards objective_3" in shown.stdout
    without = runner.invoke(app, [*command, "--samples", "0"])
    assert "towards" not in without.stdout
    wrong = runner.invoke(app, [*command, "--split", "both"])
    assert wrong.exit_code == 2
    assert "--split is train or test" in wrong.stderr


def test_ids_of_the_tiny_models_are_letters():
    assert Letters().decode(some_ids(1, 3)[0].tolist()).isalpha()
