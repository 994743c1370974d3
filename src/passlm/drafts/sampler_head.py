"""The sampler head: corrects a look-ahead row's logits once the tokens before it are known.

A look-ahead row predicts without knowing the tokens drawn just before it. This head reads the row's
hidden state and the embeddings of the last few tokens and corrects the logits of the row's own best
tokens. It runs along a group, one row after the other, without a pass of the target.

Samragh et al., "Your LLM knows the future" (arXiv 2507.11851), sample in this way; Hydra (Ankner
et al., arXiv 2402.05109) shows the gain from knowing the token before.
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

SHORTLIST = 64
OUT_OF_REACH = -1e9  # logit of a token that is not on the shortlist: finite, for processors
EPSILON = 1e-6


class SamplerHead(nn.Module):
    """Two layers from a hidden state and embeddings to a correction of the hidden state.

    `correction = out(silu(hidden_in(h) + token_in(e)))`. The product of the correction and a
    token's output embedding is added to the logit of each shortlisted token.

    Args:
        hidden_in: `[width, d_model]`, for the row's hidden state.
        token_in: `[width, tokens * d_model]`, for the embeddings of the `tokens` tokens before the
            row's, the last one first.
        out: `[d_model, width]`.
        shortlist: number of the row's best tokens to correct.
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
        """Return an untrained head that changes nothing: `out` is zero."""
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
        """Number of tokens before a row's own that the head reads."""
        return int(self.token_in.shape[1]) // int(self.hidden_in.shape[1])

    def told(self, tokens: int) -> SamplerHead:
        """Return a copy of the head extended to `tokens` inputs; weights of new inputs are zero."""
        more = (tokens - self.tokens) * self.hidden_in.shape[1]
        token_in = nn.functional.pad(self.token_in.detach(), (0, more))
        return SamplerHead(self.hidden_in.detach(), token_in, self.out.detach(), self.shortlist)

    def description(self) -> dict[str, int]:
        """Return the head's shape as a look-ahead card states it."""
        return {"width": self.width, "shortlist": self.shortlist, "tokens": self.tokens}

    def copied(self, device: torch.device, dtype: torch.dtype) -> SamplerHead:
        """Return a copy for decoding, without gradients.

        On a CPU, rows are float32. Where our own products are the fastest, weights have the given
        type, and a row's result does not depend on the other rows.
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
        """Return a row's part of the first layer, `[..., width]`, which needs no tokens.

        Args:
            hidden: hidden states of look-ahead rows, as the output layer takes them, `[..., d]`.
        """
        return self._times("hidden_in", normed(hidden.to(self.out.dtype)))

    def correction(self, from_hidden: Tensor, before: Tensor) -> Tensor:
        """Return the correction of the hidden state, `[..., d_model]`.

        Args:
            from_hidden: `[..., width]`.
            before: input embeddings of the tokens before the rows', the last one first,
                `[..., tokens, d_model]`.
        """
        token = self._times("token_in", normed(before.to(self.out.dtype)).flatten(-2))
        return self._times("out", nn.functional.silu(from_hidden + token))

    @property
    def packed(self) -> list[Tensor] | None:
        """Packed weights of the layers for our own products; None where torch's are used."""
        return [self._products[name].packed for name in self.NAMES] if self._products else None

    def _times(self, name: str, rows: Tensor) -> Tensor:
        product = self._products.get(name)
        return nn.functional.linear(rows, getattr(self, name)) if product is None else product(rows)


def normed(rows: Tensor) -> Tensor:
    """Return rows scaled to a root mean square of 1.

    Hidden states and embeddings differ in scale between models.

    Args:
        rows: `[..., d]`.
    """
    return rows * (rows.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


@dataclass(frozen=True)
class Embeddings:
    """The target's embedding tables, which the head shares.

    Attributes:
        inputs: input embeddings, `[V, d_model]`.
        outputs: rows of the output layer, `[V, d_model]`; may be the same tensor.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Shortlist:
    """The candidate tokens of one row.

    Attributes:
        tokens: their ids, `[K]`.
        vocabulary: size of the vocabulary.
    """

    tokens: Tensor
    vocabulary: int

    def of_all(self, logits: Tensor) -> Tensor:
        """Return logits of all tokens, `[1, V]`, from those of the shortlist, `[1, K]`."""
        whole = logits.new_full((1, self.vocabulary), OUT_OF_REACH)
        whole[:, self.tokens] = logits
        return whole


@dataclass(frozen=True)
class Draws:
    """Predetermined sampling noise of the next draws of several sequences.

    Attributes:
        noise: standard exponential numbers of the next positions of each sequence, for the tokens
            that a draft head lists or for all, `[N, depths, K]` float32, on the CPU.
        temperatures: divisor of each sequence's logits.
        noise_weights: exponent of the noise, from 0 to 1; see `judge.guess`.
    """

    noise: Tensor
    temperatures: Sequence[float]
    noise_weights: Sequence[float]

    @cached_property
    def scales(self) -> Tensor:
        """Factor of the logarithm of the noise beside undivided logits, `[N]`."""
        return torch.tensor(self.temperatures) * torch.tensor(self.noise_weights)

    @cached_property
    def flattened(self) -> Tensor:
        """Divisor of the sums of logits and noise before the softmax, `[N]`.

        At high temperatures noise is the larger part of a sum, so its largest value alone says
        little about the probability of a guess.
        """
        return torch.tensor(self.temperatures).clamp(min=1.0)

    def join(
        self, logits: Tensor, texts: Sequence[int], depth: int, tokens: Tensor | None = None
    ) -> Tensor:
        """Return the logits of some sequences with the noise of their tokens added, `[n, k]`.

        Args:
            logits: `[n, k]`.
            texts: indices of the sequences.
            depth: depth of the position, from 0.
            tokens: indices of the tokens in the noise, `[n, k]`; None for all in order.
        """
        at = list(texts)
        noise = self.noise[at, depth]
        race = noise if tokens is None else noise.gather(1, tokens.cpu())
        return logits - self.scales[at, None].to(logits) * race.log().to(logits)


class GroupSampler:
    """Corrected logits of look-ahead groups, one depth after the other.

    Args:
        head: the sampler head.
        tables: the target's embeddings.
        logits: logits of each group's rows, `[l, V]`.
        hidden: hidden states of the same rows, `[l, d_model]`.
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
    def _listed(self) -> tuple[Tensor, Tensor]:
        """Logits of each row's best tokens and their ids, both `[R, shortlist]`."""
        return shortlist(_joined(self._logits), min(self._head.shortlist, self._vocabulary))

    @cached_property
    def _from_hidden(self) -> Tensor:
        """The rows' part of the first layer, `[R, width]`."""
        return self._head.from_hidden(_joined(self._hidden))

    def likeliest(
        self, texts: Sequence[Sequence[int]], draws: Draws | None = None
    ) -> list[list[int]]:
        """Return the likeliest token of each row, given those of the rows before it.

        Args:
            texts: the tokens before each group's first row.
            draws: the noise of the next positions, for all tokens; None to guess without it.
        """
        inputs, outputs = self._tables.inputs, self._tables.outputs
        weights = self._head.packed
        if weights is not None and self._vocabulary == len(outputs):
            rows = _joined(self._logits).contiguous(), _joined(self._hidden).contiguous()
            if are_rows(*rows, inputs, outputs):
                last = last_tokens(texts, self._head.tokens, inputs.device)
                none = torch.empty(0)
                known = (none, none) if draws is None else (draws.noise, draws.scales)
                numbers = self._head.shortlist, torch.get_num_threads()
                every = torch.ops.passlm.weighed_guesses(
                    *(*rows, torch.tensor(self.lengths), last),
                    *(*weights, inputs, outputs, none, *known, *numbers),
                )
                pairs = zip(every.tolist(), self.lengths, strict=True)
                return [tokens[:length] for tokens, length in pairs]
        made: list[list[int]] = [[] for _ in texts]
        for depth in range(max(self.lengths)):
            going = [at for at, length in enumerate(self.lengths) if depth < length]
            histories = [[*texts[at], *made[at]] for at in going]
            lists, logits = self.shortlists(depth, going, histories)
            if draws is not None:
                tokens = torch.stack([own.tokens for own in lists])
                logits = draws.join(logits, going, depth, tokens)
            for at, own, best in zip(going, lists, logits.argmax(-1).tolist(), strict=True):
                made[at].append(int(own.tokens[best]))
        return made

    def shortlists(
        self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[list[Shortlist], Tensor]:
        """Return shortlists of the rows at one depth of `N` groups, and their logits.

        Where a history is shorter than the head's input, its first token is repeated.

        Args:
            depth: depth of the rows, from 0.
            groups: indices of the groups, all long enough.
            histories: the tokens before each group's row.

        Returns:
            Shortlists, and logits of their tokens, `[N, K]` float32.
        """
        rows = [self._starts[group] + depth for group in groups]
        best, every = self._listed
        known = self._tables.inputs[last_tokens(histories, self._head.tokens, every.device)]
        correction = self._head.correction(self._from_hidden[rows], known)
        tokens = every[rows]
        # Separate sums, not a matrix product: a row's result does not depend on the other rows.
        gained = (self._tables.outputs[tokens].to(correction) * correction[:, None]).sum(-1)
        logits = best[rows] + gained.float()
        return [Shortlist(own, self._vocabulary) for own in tokens], logits


def are_rows(*tensors: Tensor) -> bool:
    """Return whether the operators that guess in one call support these tensors."""
    return all(t.is_contiguous() and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)


def last_tokens(texts: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
    """Return the last tokens of each sequence, the last one first, `[N, count]`.

    Where a sequence is shorter, its first token is repeated.
    """
    back = range(1, count + 1)
    last = [[text[max(len(text) - steps, 0)] for steps in back] for text in texts]
    return torch.tensor(last, device=device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def weighed(
    head: SamplerHead, tables: Embeddings, logits: Tensor, hidden: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return corrected shortlists of many rows whose previous tokens are known, for training.

    Args:
        head: the sampler head.
        tables: the target's embeddings.
        logits: `[R, V]`.
        hidden: `[R, d_model]`.
        before: ids of the tokens before the rows', the last one first, `[R, tokens]`.

    Returns:
        Ids of the shortlisted tokens and their corrected logits, both `[R, shortlist]`.
    """
    best, tokens = logits.topk(min(head.shortlist, logits.shape[1]))
    correction = head.correction(head.from_hidden(hidden), tables.inputs[before])
    gained = torch.einsum("rsd,rd->rs", tables.outputs[tokens].to(correction), correction)
    return tokens, best + gained
