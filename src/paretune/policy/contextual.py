"""Gates that depend on the prompt: features of its text, a model of the returns, and the gates that the model likes best.

    returns_M(x, g) = sum_dq theta_dqm phi_d(x) psi_q(g)

phi is 1 and the prompt's features, psi smooth functions of the gates. The model gives every objective's return, so that one model answers
all preferences: gates(w, x) is the argmax of w . returns(x, g) over the box [0, top]^K. Axes: F features, D = F + 1, Q functions
of the gates, C candidates.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.policy.rules import GateRule
from paretune.registry import GATE_RULES
from paretune.types import Prompt

__all__ = ["Contextual", "Features", "GateBasis", "Pooled", "box_lattice", "text_of_prompt"]

CANDIDATES = 800  # gates at which the model is looked at before the best one is refined
HALVINGS = 5


def text_of_prompt(prompt: Prompt) -> str:
    """A prompt's text; of a chat, the contents of all its messages."""
    if prompt.messages is None:
        return prompt.text or ""
    return "\n".join(str(message["content"]) for message in prompt.messages)


@dataclass(frozen=True)
class Features:
    """What is read of a prompt, without any task or model.

    "letters": one indicator for each of the first `size` places and each of `symbols`; what is not among them has none.
    "words": counts of the words, lower case, hashed into `size` buckets. "none": nothing, the same gates for every prompt.
    Each prompt's features have length 1 at most, times `share`: how much a feature is believed against what all prompts have in common.
    """

    kind: Literal["letters", "words", "none"] = "none"
    size: int = 0
    symbols: str = ""
    share: float = 1.0

    @property
    def count(self) -> int:
        """F."""
        return {"letters": self.size * len(self.symbols), "words": self.size, "none": 0}[self.kind]

    def of(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """(N, F) features."""
        return np.array([self._one(text_of_prompt(prompt)) for prompt in prompts]).reshape(len(prompts), self.count)

    def _one(self, text: str) -> np.ndarray:
        found_F = np.zeros(self.count)
        if self.kind == "letters":
            for place, letter in enumerate(text[: self.size]):
                if letter in self.symbols:
                    found_F[place * len(self.symbols) + self.symbols.index(letter)] = 1.0
            return self.share * found_F / np.sqrt(max(1, self.size))
        if self.kind == "words":
            for word in text.lower().split():
                found_F[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % self.size] += 1.0
        return self.share * found_F / max(1.0, float(np.sqrt((found_F**2).sum())))

    @classmethod
    def fitting(cls, kind: str, prompts: Sequence[Prompt], *, share: float, places: int = 8, buckets: int = 64) -> Features:
        """Features for these prompts; "auto" takes letters where no prompt is longer than `places`, else words."""
        texts = [text_of_prompt(prompt) for prompt in prompts]
        longest = max(map(len, texts))
        if kind == "auto":
            kind = "letters" if longest <= places else "words"
        if kind == "letters":
            places = min(longest, places)
            return cls("letters", places, "".join(sorted({letter for text in texts for letter in text[:places]})), share)
        return cls("words", buckets, "", share) if kind == "words" else cls()


def box_lattice(count: int, top: float, budget: int) -> np.ndarray:
    """(C, count) an even lattice of [0, top]^count with at most `budget` points, at least 2 per axis."""
    axis = np.linspace(0.0, top, max(2, int(budget ** (1 / count) + 1e-9)))
    return np.array(list(itertools.product(axis, repeat=count)))


class GateBasis:
    """psi: 1, and smooth bumps of `width` around an even lattice of at most `landmarks` gates, made independent of each other.

    Ridge on these terms is a Gaussian process with a squared-exponential kernel, seen through its landmarks (Nystroem): gates that are
    near each other have returns that are near each other, and far from all landmarks nothing is claimed.
    """

    def __init__(self, count: int, *, landmarks: int, width: float, top: float):
        self._landmarks_QK, self._width = box_lattice(count, top, landmarks), width
        kernel_QQ = self._kernel(self._landmarks_QK) + 1e-8 * np.eye(len(self._landmarks_QK))
        self._inverse_QQ = np.linalg.inv(np.linalg.cholesky(kernel_QQ))

    @property
    def terms(self) -> int:
        """Q."""
        return len(self._landmarks_QK) + 1

    def of(self, gates_CK: np.ndarray) -> np.ndarray:
        """(C, Q)."""
        return np.concatenate([np.ones((len(gates_CK), 1)), self._kernel(np.asarray(gates_CK)) @ self._inverse_QQ.T], axis=1)

    def _kernel(self, gates_CK: np.ndarray) -> np.ndarray:
        return np.exp(-((gates_CK[:, None] - self._landmarks_QK) ** 2).sum(-1) / (2 * self._width**2))


@GATE_RULES.register("contextual")
@dataclass(frozen=True)
class Contextual(GateRule):
    """The gates in [0, top]^K that the model of the returns likes best for a preference and a prompt; see the module's docstring.

    Without a prompt its features are `mean_F`, those of the training prompts on average.
    """

    stepwise: ClassVar[bool] = True
    features: Features
    mean_F: tuple[float, ...]
    adapters: int
    landmarks: int
    width: float
    top: float
    theta_DQM: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self):
        found = np.shape(self.theta_DQM)
        wanted = (self.features.count + 1, self._basis.terms)
        if found[:2] != wanted or len(self.mean_F) != self.features.count or not np.isfinite(self.theta_DQM).all():
            raise ConfigError(
                "contextual: theta_DQM has a row per feature, one for the constant first, and a column per landmark and one",
                found=f"shape {found} for {wanted} and {len(self.mean_F)} means, or numbers that are not finite",
                remedy="learn the rule anew",
            )

    @cached_property
    def _theta_DQM(self) -> np.ndarray:
        return np.asarray(self.theta_DQM)

    @cached_property
    def _basis(self) -> GateBasis:
        return GateBasis(self.adapters, landmarks=self.landmarks, width=self.width, top=self.top)

    @cached_property
    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        gates_CK = box_lattice(self.adapters, self.top, CANDIDATES)
        return gates_CK, self._basis.of(gates_CK)

    @cached_property
    def _moves_CK(self) -> np.ndarray:
        if self.adapters <= 4:
            return np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=self.adapters)))
        return np.concatenate([np.zeros((1, self.adapters)), np.eye(self.adapters), -np.eye(self.adapters)])

    @property
    def per_prompt(self) -> bool:
        return self.features.kind != "none"

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        mean_F = np.asarray(self.mean_F)
        return np.stack([self._best(w_M, mean_F) for w_M in np.asarray(w_WM, dtype=np.float64)])

    def prompt_gates(self, w_WM: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """(W, P, K), each prompt and each preference by itself."""
        features_PF = self.features.of(prompts)
        return np.stack([[self._best(w_M, x_F) for x_F in features_PF] for w_M in np.asarray(w_WM, dtype=np.float64)])

    def returns(self, gates_CK: np.ndarray, prompt: Prompt) -> np.ndarray:
        """(C, M) returns that the model expects for a prompt."""
        phi_D = np.concatenate([[1.0], self.features.of([prompt])[0]])
        return self._basis.of(gates_CK) @ np.einsum("d,dqm->qm", phi_D, self._theta_DQM)

    def _best(self, w_M: np.ndarray, x_F: np.ndarray) -> np.ndarray:
        value_Q = np.einsum("d,dqm,m->q", np.concatenate([[1.0], x_F]), self._theta_DQM, w_M)
        gates_CK, psi_CQ = self._candidates
        best_K = gates_CK[int((psi_CQ @ value_Q).argmax())]
        step = self.top / max(1, round(len(gates_CK) ** (1 / self.adapters)) - 1)
        for _ in range(HALVINGS):
            step /= 2
            near_CK = np.clip(best_K + step * self._moves_CK, 0.0, self.top)
            best_K = near_CK[int((self._basis.of(near_CK) @ value_Q).argmax())]
        return best_K


@GATE_RULES.register("pooled")
@dataclass(frozen=True)
class Pooled(GateRule):
    """The best of some gates for every preference, by the returns that were measured at them: argmax of w . returns; ties to the first."""

    stepwise: ClassVar[bool] = True
    gates_GK: tuple[tuple[float, ...], ...]
    returns_GM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        if not self.gates_GK or len(self.gates_GK) != len(self.returns_GM) or not np.isfinite(self.returns_GM).all():
            raise ConfigError(
                "pooled: every row of gates has its returns, finite numbers",
                found=f"{len(self.gates_GK)} rows of gates, {len(self.returns_GM)} of returns",
                remedy="leave out gates where an objective could not be scored",
            )

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        value_WG = np.einsum("wm,gm->wg", np.asarray(w_WM, dtype=np.float64), np.asarray(self.returns_GM))
        return np.asarray(self.gates_GK, dtype=np.float64)[value_WG.argmax(1)]
