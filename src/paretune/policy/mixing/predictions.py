"""Mixings of predictions: every expert gives a next-token distribution, and the policy is a mean of them, token by token.

All experts run in one stacked batch (`Stacked`). `logit` is their weighted product, `divergence` holds the means that belong to other
divergences than the reverse KL, and `robust` is the product at the worst weights near the preference.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError
from paretune.policy.base import MIXINGS, Policy
from paretune.policy.lora.decoder import branch_point, branched, run_head, stacked_share
from paretune.seeds import forked_torch, seed_for

__all__ = ["DIVERGENCES", "DivergenceMix", "LogitMix", "RobustMix", "Stacked", "weighted", "worst_weights"]


class Stacked(Policy):
    """All K experts in one forward: the batch repeated K times, block k under adapter k, one cache of K * N rows.

    Where adapters begin above the first decoder layer, the layers below are run once, on N rows: see `lora.decoder`.
    """

    @property
    def copies(self) -> int:
        return self.K

    @property
    def forwards_per_token(self) -> float:
        """One, and the part above the shared trunk (by its weights, head included) once more for every other copy."""
        return 1 + (self.copies - 1) * stacked_share(self.bank)

    @contextlib.contextmanager
    def _stacked(self, mode: contextlib.AbstractContextManager[None], *inputs: Any) -> Iterator[dict[str, Any]]:
        """The model's arguments, in a context (`mode` chooses the adapters) where its output has `copies` * N rows."""
        first = branch_point(self.bank)
        with mode, branched(self.bank.stack, first, self.copies) if first else contextlib.nullcontext():
            yield self._inputs(1 if first else self.copies, *inputs)


@MIXINGS.register("logit")
class LogitMix(Stacked):
    """A product of the experts, token by token: log pi(y_t) = sum_k g_k log pi_k(y_t) + constant.

    Source: MOD (2406.18853), the reverse-KL case.
    Differs: all experts share one stacked forward and one cache. Logits are mixed instead of their log-softmaxes: the normalizers
        are constants over V for each row, and drop out. Under a linear head that the experts share, states are mixed and the head
        runs once, which gives the same numbers.
    Hides: the sequence-level product is optimal for linear preferences, the token-level one is not; K forwards per token (of the
        layers with adapters and those above).
    """

    has_composition_limit = True
    attribution = "product"
    why_many = "it mixes the experts' predictions token by token, which no single set of weights computes"

    @property
    def splits_head(self) -> bool:
        """Whether states may be mixed in place of logits: not in a subclass that combines in another way."""
        own = type(self).combine is LogitMix.combine and type(self).parts is LogitMix.parts
        return own and self.has_own_head and self._linear_head

    @functools.cached_property
    def _linear_head(self) -> bool:
        """Whether the head of a difference of states is the difference of the heads: it has no bias and no soft cap.

        In less than float32 the mixed states would be rounded, where logits are mixed in float32.
        """
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or head.weight.dtype != torch.float32:
            return False
        with forked_torch(seed_for(0, "head")), torch.inference_mode():
            h_2H = torch.randn(2, head.in_features).to(head.weight)
            one, two, apart = (run_head(self.model, h_1H[None, None]).double() for h_1H in (h_2H[0], h_2H[1], h_2H[0] - 2 * h_2H[1]))
        return bool((one - 2 * two - apart).abs().max() < 1e-4 * apart.std())

    def forward(self, input_ids_NT, *, gates_NK, attention_mask=None, position_ids=None, cache=None, last_only=False):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache, "last_only": last_only}
        if gates_NK is None or not self.splits_head:
            return super().forward(input_ids_NT, gates_NK=gates_NK, **given)
        with contextlib.nullcontext() if self._headless else self.headless():
            h_NTH = super().forward(input_ids_NT, gates_NK=gates_NK, **given)
        return h_NTH if self._headless else run_head(self.model, h_NTH)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, V) logits of the experts, in the model's dtype."""
        with self._stacked(self.bank.blocks(), input_ids_NT, attention_mask, position_ids, cache) as inputs:
            logits = self._logits(inputs, last_only)
        return logits.unflatten(0, (self.K, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        return weighted(parts, gates_NK)


def weighted(parts: Tensor, gates: Tensor | None) -> Tensor:
    """sum_k g_k parts_k in float32 (or wider): parts (K, N, T, X), gates (N, K) or (N, T, K) -> (N, T, X)."""
    assert gates is not None
    wide = torch.promote_types(parts.dtype, torch.float32)
    gates = (gates if gates.dim() == 3 else gates[:, None]).to(wide)
    mixed = parts[0].to(wide) * gates[:, :, :1]
    for k in range(1, len(parts)):
        mixed = mixed.addcmul(parts[k].to(wide), gates[:, :, k : k + 1])
    return mixed


DIVERGENCES = ("forward-kl", "alpha", "js")
NEAR = -15.0  # in nats; exp(NEAR) is what float32 leaves out beside 1


@MIXINGS.register("divergence")
class DivergenceMix(LogitMix):
    """The mixture that a divergence other than the reverse KL asks for, token by token, normalized over V:

        forward-kl  pi = (sum_k g_k / pi_k)^-1                              the weighted harmonic mean
        alpha       pi = (sum_k g_k pi_k^-alpha)^(-1/alpha)                 0 < alpha <= 1; 1 is forward-kl, towards 0 the product
        js          s(pi) = prod_k s(pi_k)^g_k, s(p) = p / (p + pi_ref)     Jensen-Shannon; K + 1 forwards: it needs the reference

    Each is pi_ref f'^-1(sum_k g_k f'(pi_k / pi_ref)) for the f of its divergence; for the first two pi_ref cancels.
    Source: MOD (2406.18853).
    Differs: the authors' code leaves 1/alpha out, which is harmless under argmax and another distribution when sampling. The
        constant that makes probabilities sum to 1 is a factor outside, as in their formulas; inside of f', where the Lagrangian of a
        single decision would put it, it has no closed form for these f.
    Hides: it is the answer to training under that divergence. Experts trained under the reverse KL, as here, are mixed for another game.
    """

    has_composition_limit = False
    attribution = "shapley"

    def __init__(self, bank: Any, tokenizer: Any, *, divergence: str = "forward-kl", alpha: float = 0.5):
        super().__init__(bank, tokenizer)
        if divergence not in DIVERGENCES or not 0 < alpha <= 1:
            raise ConfigError(
                f"a divergence is one of {', '.join(DIVERGENCES)}, and 0 < alpha <= 1",
                found=f"divergence={divergence!r}, alpha={alpha:g}",
                remedy='use mixing "logit" for the reverse KL; alpha matters to "alpha" only',
            )
        self.divergence, self.alpha = divergence, alpha

    @property
    def settings(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "alpha": self.alpha}

    @property
    def copies(self) -> int:
        return self.K + (self.divergence == "js")

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, V) logits of the experts; for js (K + 1, N, T, V), the reference last."""
        if self.divergence != "js":
            return super().parts(input_ids_NT, attention_mask, position_ids, cache, gates_NK, last_only)
        rows = torch.eye(self.K + 1, self.K, device=self.device).repeat_interleave(len(input_ids_NT), 0)  # the last block: no adapter
        with self._stacked(self.bank.gates(rows), input_ids_NT, attention_mask, position_ids, cache) as inputs:
            logits = self._logits(inputs, last_only)
        return logits.unflatten(0, (self.copies, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        logp = _log_softmax(parts)
        gates = _columns(gates_NK, logp)
        if self.divergence == "js":
            ratio = logp[:-1] - logp[-1:]
            mixed = (gates * functional.logsigmoid(ratio)).sum(0)  # log s(pi), below 0
            near = (gates.log() - ratio).logsumexp(0)  # log(1 - s(pi)) where s(pi) is almost 1 and would round to it
            return logp[-1] + mixed - torch.where(near < NEAR, near, torch.log(-torch.expm1(mixed.clamp(max=-1e-30))))
        power = self.alpha if self.divergence == "alpha" else 1.0
        return (gates.log() - power * logp).logsumexp(0) / -power


@MIXINGS.register("robust")
class RobustMix(LogitMix):
    """The product of the experts at the worst weights within `radius` of the preference, chosen anew for every token.

    The weights are g = (1 - radius) w + radius u, with u anywhere on the simplex; radius 1 is the source's game, which does not hear
    the preference, and radius 0 is logit mixing. The worst weights minimize log sum_y prod_k pi_k(y)^g_k, and the policy is the
    product at them: the best answer to them, and the saddle point of max_pi min_g E_pi[sum_k g_k log(pi_k / pi_ref)] - KL(pi || pi_ref).
    At radius 1 the mixture is equally far, in KL, from every expert that has a weight.
    Source: RMOD (2503.08796): decoding as a game between policy and weights, whose equilibrium is a convex problem in the weights.
    Differs: the source trains a value function per objective and plays for the next block of tokens on sampled candidates. Here the
        experts' log-ratios are the values (in nats, the source's trade-off constant is 1), the game is played at every token over the
        whole vocabulary and solved exactly. What a log-ratio does not know is how good the situation already is for each objective:
        the source's values do, so that its weights follow an objective that has fallen behind, and these do not. `radius` is ours.
    Hides: with radius above 0 a preference for one objective alone does not give its expert. The solver passes over the vocabulary
        some forty times per token, which a small vocabulary does not notice and a large one does.
    """

    has_composition_limit = False
    attribution = "shapley"
    why_many = "it chooses the worst weights near the preference anew for every token"

    def __init__(self, bank: Any, tokenizer: Any, *, radius: float = 1.0):
        super().__init__(bank, tokenizer)
        if not 0 <= radius <= 1:
            raise ConfigError(
                "the radius of the worst case lies between 0 and 1", found=f"radius={radius:g}", remedy="1 is the source's game"
            )
        self.radius, self.vertices_are_experts = radius, radius == 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"radius": self.radius}

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        logp = _log_softmax(parts)
        gates = _columns(gates_NK, logp)[..., 0].movedim(0, -1)  # (N, T or 1, K)
        weights = worst_weights(logp, gates / gates.sum(-1, keepdim=True), radius=self.radius)
        return torch.einsum("ntk,kntv->ntv", weights.to(logp.dtype), logp)


def worst_weights(logp_KNTV: Tensor, center_NTK: Tensor, *, radius: float, rounds: int = 9, steps: int = 4) -> Tensor:
    """(N, T, K) float64 minimizers of log sum_v exp(sum_k g_k logp_k) over g = (1 - radius) center + radius u, u on the simplex.

    The problem is convex with K unknowns: Newton's method with a logarithmic barrier for u >= 0 that shrinks tenfold every round, and
    steps halved until the value falls. No gradient.
    """
    with torch.no_grad():
        x, center = logp_KNTV.double(), center_NTK.double()
        k = len(x)
        u = torch.full((*x.shape[1:3], k), 1.0 / k, dtype=torch.float64, device=x.device)

        def mixed(u: Tensor) -> Tensor:
            return torch.einsum("ntk,kntv->ntv", (1 - radius) * center + radius * u, x)

        def value(u: Tensor, barrier: float) -> Tensor:
            return mixed(u).logsumexp(-1) - barrier * u.log().sum(-1)

        system = torch.zeros(*u.shape[:2], k + 1, k + 1, dtype=torch.float64, device=x.device)
        system[..., :k, k] = system[..., k, :k] = 1.0  # the step keeps the sum of u
        for barrier in (10.0**-n for n in range(1, rounds + 1) for _ in range(steps)):
            p = mixed(u).softmax(-1)
            mean = torch.einsum("ntv,kntv->ntk", p, x)
            off = x - mean.movedim(-1, 0)[..., None]
            slope = radius * mean - barrier / u
            system[..., :k, :k] = radius**2 * torch.einsum("ntv,kntv,jntv->ntkj", p, off, off) + torch.diag_embed(barrier / u**2)
            step = torch.linalg.solve(system, torch.cat([-slope, torch.zeros_like(u[..., :1])], -1))[..., :k]
            fall = torch.where(step < 0, -u / step, torch.inf).amin(-1, keepdim=True)
            length = (0.95 * fall).clamp(max=1.0)
            here = value(u, barrier)
            for _ in range(12):
                worse = value(u + length * step, barrier) > here + 1e-14
                if not bool(worse.any()):
                    break
                length = torch.where(worse[..., None], length / 2, length)
            u = torch.where((value(u + length * step, barrier) > here + 1e-14)[..., None], u, u + length * step)
        return (1 - radius) * center + radius * u


def _log_softmax(parts: Tensor) -> Tensor:
    return parts.to(torch.promote_types(parts.dtype, torch.float32)).log_softmax(-1)


def _columns(gates: Tensor | None, logp: Tensor) -> Tensor:
    """Gates (N, K) or (N, T, K) as (K, N, 1 or T, 1); these mixtures mean nothing for negative ones."""
    assert gates is not None
    if bool((gates < 0).any()) or not bool((gates.sum(-1) > 0).all()):
        raise ConfigError(
            "the gates of this mixing are weights: none negative, and not all 0",
            found=f"a smallest gate of {gates.min().item():g}, a smallest sum of {gates.sum(-1).min().item():g}",
            remedy='use a rule that gives weights, or mixing "logit", which extrapolates',
        )
    gates = (gates if gates.dim() == 3 else gates[:, None]).to(logp.dtype)
    return gates.movedim(-1, 0)[..., None]
