"""The sampler head: corrects the logits of look-ahead rows for the tokens drafted before them.

A look-ahead row is computed before the tokens just in front of it are drawn. This head takes the
row's hidden state and the embeddings of the last one or few of those tokens, and corrects the
logits of the row's best tokens. It runs along a look-ahead group, one row after the other, without
a pass of the target. Drawing from the corrected logits is left to `drawing.py`.

Samragh et al., "Your LLM knows the future" (arXiv 2507.11851), sample in this way. Hydra (Ankner
et al., arXiv 2402.05109) measures the gain from conditioning a head on the previous token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from passlm.kernels.linear import RowsProduct, preferred
from passlm.kernels.topk import shortlist

torch.library.define(
    "passlm::weighed_guesses",
    "(Tensor logits, Tensor hidden, Tensor lengths, Tensor last, Tensor hidden_in, "
    "Tensor token_in, Tensor out, Tensor inputs, Tensor outputs, Tensor none, Tensor noise, "
    "Tensor scales, int listed, int threads) -> Tensor",
)

SHORTLIST = 64  # best tokens of a row that are corrected
OUT_OF_REACH = -1e9  # logit of a token off the shortlist; finite, since processors divide it
EPSILON = 1e-6  # added to the mean square before normalizing


class SamplerHead(nn.Module):
    """Two layers from a hidden state and token embeddings to a correction of the hidden state.

    `correction = out(silu(hidden_in(h) + token_in(e)))`. The dot product of the correction and a
    token's output embedding is added to the token's logit, for shortlisted tokens only.

    Args:
        hidden_in: weights for the row's hidden state, `[width, d_model]`.
        token_in: weights for the embeddings of the `tokens` tokens before the row's own, the last
            one first, `[width, tokens * d_model]`.
        out: weights of the second layer, `[d_model, width]`.
        shortlist: number of the row's best tokens whose logits are corrected.
    """

    NAMES = ("hidden_in", "token_in", "out")

    def __init__(
        self, hidden_in: Tensor, token_in: Tensor, out: Tensor, shortlist: int = SHORTLIST
    ) -> None:
        super().__init__()
        self.hidden_in = nn.Parameter(hidden_in)
        self.token_in = nn.Parameter(token_in)
        self.out = nn.Parameter(out)
        self.shortlist = shortlist
        self._products: dict[str, RowsProduct] = {}

    @classmethod
    def start(
        cls, d_model: int, width: int, shortlist: int = SHORTLIST, seed: int = 0, tokens: int = 1
    ) -> SamplerHead:
        """Return an untrained head, which changes no logit: `out` is zero.

        Args:
            d_model: size of a hidden state.
            width: size of the hidden layer.
            shortlist: number of the row's best tokens whose logits are corrected.
            seed: seed of the random first layer.
            tokens: number of tokens before its own that a row is conditioned on.
        """
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(1 + tokens, width, d_model, generator=generator) / d_model**0.5
        token_in = torch.cat(list(first[1:]), dim=1)
        return cls(first[0], token_in, torch.zeros(d_model, width), shortlist)

    @property
    def width(self) -> int:
        """Size of the hidden layer."""
        return int(self.out.shape[1])

    @property
    def tokens(self) -> int:
        """Number of tokens before its own that a row is conditioned on."""
        return int(self.token_in.shape[1]) // int(self.hidden_in.shape[1])

    def extended_to(self, tokens: int) -> SamplerHead:
        """Return a copy conditioned on `tokens` tokens; weights of the new inputs are zero."""
        more = (tokens - self.tokens) * self.hidden_in.shape[1]
        token_in = nn.functional.pad(self.token_in.detach(), (0, more))
        return SamplerHead(self.hidden_in.detach(), token_in, self.out.detach(), self.shortlist)

    def description(self) -> dict[str, int]:
        """Return the head's sizes, as the look-ahead card lists them."""
        return {"width": self.width, "shortlist": self.shortlist, "tokens": self.tokens}

    def copied(self, device: torch.device, dtype: torch.dtype) -> SamplerHead:
        """Return a copy for decoding, without gradients.

        On a CPU, rows and parameters are float32. Where our own products are the fastest, they use
        weights of type `dtype`, and a row's result does not depend on the rows beside it.
        """
        rows = torch.float32 if device.type == "cpu" else dtype
        copies = [getattr(self, n).detach().to(device, rows, copy=True) for n in self.NAMES]
        copy = SamplerHead(copies[0], copies[1], copies[2], self.shortlist)
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and preferred():
            weights = zip(self.NAMES, copies, strict=True)
            copy._products = {name: RowsProduct(weight.to(dtype)) for name, weight in weights}
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters by the names they are stored under."""
        return {f"sampler.{name}": tensor for name, tensor in self.named_parameters()}

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """Return the hidden states' part of the first layer, `[..., width]`.

        It does not depend on tokens, so it is computed once for a whole group.

        Args:
            hidden: inputs of the target's output layer for look-ahead rows, `[..., d_model]`.
        """
        return self._times("hidden_in", normed(hidden.to(self.out.dtype)))

    def correction(self, from_hidden: Tensor, before: Tensor) -> Tensor:
        """Return the correction of the hidden states, `[..., d_model]`.

        Args:
            from_hidden: result of the method of this name, `[..., width]`.
            before: input embeddings of the tokens before each row's own, the last one first,
                `[..., tokens, d_model]`.
        """
        token = self._times("token_in", normed(before.to(self.out.dtype)).flatten(-2))
        return self._times("out", nn.functional.silu(from_hidden + token))

    @property
    def packed(self) -> list[Tensor] | None:
        """Weights in the layout of our own products; None where torch multiplies."""
        return [self._products[name].packed for name in self.NAMES] if self._products else None

    def _times(self, name: str, rows: Tensor) -> Tensor:
        product = self._products.get(name)
        return nn.functional.linear(rows, getattr(self, name)) if product is None else product(rows)


def normed(rows: Tensor) -> Tensor:
    """Return the rows scaled to root mean square 1.

    The scale of hidden states and embeddings differs between models.

    Args:
        rows: `[..., d]`.
    """
    return rows * (rows.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


@dataclass(frozen=True)
class Embeddings:
    """Embedding tables of the target, used by the heads as well.

    Attributes:
        inputs: input embeddings, `[V, d_model]`.
        outputs: weights of the output layer, `[V, d_model]`; may be the same tensor.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Shortlist:
    """The tokens that may be drafted from a row.

    Attributes:
        tokens: their ids, `[K]`.
        vocabulary: size of the whole vocabulary, `V`.
    """

    tokens: Tensor
    vocabulary: int

    def of_all(self, logits: Tensor) -> Tensor:
        """Return logits of all tokens, `[1, V]`, from those of the shortlist, `[1, K]`.

        Tokens off the shortlist get `OUT_OF_REACH`.
        """
        whole = logits.new_full((1, self.vocabulary), OUT_OF_REACH)
        whole[:, self.tokens] = logits
        return whole


@dataclass(frozen=True)
class Draws:
    """Predetermined sampling noise of the next draws of several sequences.

    The coupled judge settles tokens with this noise, so a drafter that knows it guesses better.

    Attributes:
        noise: standard exponential numbers of each sequence's next positions, for all tokens or
            for those a draft head lists, `[N, depths, K]` float32, on the CPU.
        temperatures: divisor of each sequence's logits, `N` numbers.
        noise_weights: exponent of the noise for each sequence, from 0 to 1; see `judge.guess`.
    """

    noise: Tensor
    temperatures: Sequence[float]
    noise_weights: Sequence[float]

    @cached_property
    def scales(self) -> Tensor:
        """Factor of the noise's logarithm where it is subtracted from raw logits, `[N]`."""
        return torch.tensor(self.temperatures) * torch.tensor(self.noise_weights)

    @cached_property
    def softmax_temperatures(self) -> Tensor:
        """Temperature of the softmax that gives a guess's probability, `max(1, T)`, `[N]`.

        At high temperatures most of a perturbed logit is noise, so that without this division the
        largest one would look certain.
        """
        return torch.tensor(self.temperatures).clamp(min=1.0)

    def perturb(
        self, logits: Tensor, sequences: Sequence[int], depth: int, tokens: Tensor | None = None
    ) -> Tensor:
        """Return the logits of some sequences with the noise subtracted, `l - w T log e`, `[n, k]`.

        Args:
            logits: `[n, k]`.
            sequences: indices of the `n` sequences.
            depth: place of the position among the next ones, from 0.
            tokens: index in the noise of each logit's token, `[n, k]`; None for all tokens in
                order.
        """
        at = list(sequences)
        noise = self.noise[at, depth]
        exponential = noise if tokens is None else noise.gather(1, tokens.cpu())
        return logits - self.scales[at, None].to(logits) * exponential.log().to(logits)


class GroupSampler:
    """Corrects the logits of look-ahead groups with a sampler head, row by row.

    Args:
        head: the sampler head.
        tables: the target's embeddings.
        logits: logits of each group's rows, `[l, V]`.
        hidden: hidden states of the same rows, `[l, d_model]`.

    Attributes:
        lengths: number of rows of each group.
    """

    def __init__(
        self,
        head: SamplerHead,
        tables: Embeddings,
        logits: Sequence[Tensor],
        hidden: Sequence[Tensor],
    ) -> None:
        self._head = head
        self._tables = tables
        self._logits = logits
        self._hidden = hidden
        self._vocabulary = logits[0].shape[1]
        self.lengths = [len(group) for group in logits]
        self._starts = [0, *accumulate(self.lengths)]

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        """Logits and ids of each row's best tokens, both `[R, shortlist]`."""
        return shortlist(_concatenated(self._logits), min(self._head.shortlist, self._vocabulary))

    @cached_property
    def _from_hidden(self) -> Tensor:
        """The hidden states' part of the first layer, `[R, width]`."""
        return self._head.from_hidden(_concatenated(self._hidden))

    def likeliest(
        self, histories: Sequence[Sequence[int]], draws: Draws | None = None
    ) -> list[list[int]]:
        """Return the likeliest token of each row, given those of the rows before it.

        Args:
            histories: token ids of each sequence, up to those before its group's first row.
            draws: sampling noise of the next positions, for all tokens; the guesses are then those
                of `Draws.perturb`'s logits. None for the likeliest tokens without it.
        """
        inputs, outputs = self._tables.inputs, self._tables.outputs
        weights = self._head.packed
        if weights is not None and self._vocabulary == len(outputs):
            logits = _concatenated(self._logits).contiguous()
            hidden = _concatenated(self._hidden).contiguous()
            if fit_operators(logits, hidden, inputs, outputs):
                last = last_tokens(histories, self._head.tokens, inputs.device)
                none = torch.empty(0)
                noise = (none, none) if draws is None else (draws.noise, draws.scales)
                numbers = self._head.shortlist, torch.get_num_threads()
                guessed = torch.ops.passlm.weighed_guesses(
                    *(logits, hidden, torch.tensor(self.lengths), last),
                    *(*weights, inputs, outputs, none, *noise, *numbers),
                )
                pairs = zip(guessed.tolist(), self.lengths, strict=True)
                return [tokens[:length] for tokens, length in pairs]
        guesses: list[list[int]] = [[] for _ in histories]
        for depth in range(max(self.lengths)):
            active = [at for at, length in enumerate(self.lengths) if depth < length]
            so_far = [[*histories[at], *guesses[at]] for at in active]
            lists, logits = self.shortlists(depth, active, so_far)
            if draws is not None:
                tokens = torch.stack([own.tokens for own in lists])
                logits = draws.perturb(logits, active, depth, tokens)
            for at, own, best in zip(active, lists, logits.argmax(-1).tolist(), strict=True):
                guesses[at].append(int(own.tokens[best]))
        return guesses

    def shortlists(
        self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[list[Shortlist], Tensor]:
        """Return the shortlists of the rows at one depth, and the corrected logits.

        Args:
            depth: index of the row in its group, from 0.
            groups: indices of `N` groups that have such a row.
            histories: token ids before each of these rows; see `last_tokens`.

        Returns:
            `N` shortlists, and logits of their tokens, `[N, K]` float32.
        """
        rows = [self._starts[group] + depth for group in groups]
        best_logits, best_tokens = self._best
        last = last_tokens(histories, self._head.tokens, best_tokens.device)
        correction = self._head.correction(self._from_hidden[rows], self._tables.inputs[last])
        tokens = best_tokens[rows]
        # Separate sums instead of a matrix product: a row's result does not depend on other rows.
        gained = (self._tables.outputs[tokens].to(correction) * correction[:, None]).sum(-1)
        logits = best_logits[rows] + gained.float()
        return [Shortlist(own, self._vocabulary) for own in tokens], logits


def fit_operators(*tensors: Tensor) -> bool:
    """Return whether the operators that guess in one call take these tensors."""
    return all(t.is_contiguous() and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)


def last_tokens(histories: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
    """Return the last `count` token ids of each sequence, the last one first, `[N, count]`.

    For a shorter sequence, the first token is repeated.
    """
    back = range(1, count + 1)
    last = [[history[max(len(history) - steps, 0)] for steps in back] for history in histories]
    return torch.tensor(last, device=device)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def weighed(
    head: SamplerHead, tables: Embeddings, logits: Tensor, hidden: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the shortlists of rows whose previous tokens are known, for training.

    Args:
        head: the sampler head.
        tables: the target's embeddings.
        logits: logits of look-ahead rows, `[R, V]`.
        hidden: hidden states of the same rows, `[R, d_model]`.
        before: ids of the tokens before each row's own, the last one first, `[R, tokens]`.

    Returns:
        Ids of the shortlisted tokens and their corrected logits, both `[R, shortlist]`.
    """
    best, tokens = logits.topk(min(head.shortlist, logits.shape[1]))
    correction = head.correction(head.from_hidden(hidden), tables.inputs[before])
    gained = torch.einsum("rsd,rd->rs", tables.outputs[tokens].to(correction), correction)
    return tokens, best + gained
