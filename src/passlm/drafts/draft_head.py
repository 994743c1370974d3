"""The draft head: candidates from the hidden state of the last accepted row.

Every pass computes that hidden state anyway. From it and the embeddings of the last few tokens,
settled or drafted, this head predicts the next token and those after it, one after the other. It
chooses among the most frequent tokens only. A guess costs a small part of a pass, so candidates are
available where no look-ahead group was computed.

Heads conditioned on the previous tokens: Hydra (Ankner et al., arXiv 2402.05109). Drafting from a
part of the vocabulary: FR-Spec (Zhao et al., arXiv 2502.14856).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from passlm.drafts.drawing import by_guessing, draw_together, known_noise
from passlm.drafts.protocol import DraftSequence, PassResult, Verified
from passlm.drafts.sampler_head import (
    EPSILON,
    SHORTLIST,
    Draws,
    Embeddings,
    Shortlist,
    fit_operators,
    last_tokens,
    normed,
)
from passlm.kernels.linear import RowsProduct, preferred
from passlm.kernels.topk import likeliest, shortlist
from passlm.layers.int8 import rounded
from passlm.plan import Chain, Guessing, Source

torch.library.define(
    "passlm::guesses",
    "(Tensor hidden, Tensor last, Tensor lengths, Tensor hidden_in, Tensor hidden_scale, "
    "Tensor token_in, Tensor token_scale, Tensor depth_in, Tensor out, Tensor out_scale, "
    "Tensor outputs, Tensor outputs_scale, Tensor listed, Tensor inputs, Tensor noise, "
    "Tensor scales, Tensor flattened, int threads) -> (Tensor, Tensor)",
)


class DraftHead(nn.Module):
    """Two layers from a hidden state and token embeddings to logits of the listed tokens.

    The `j`-th guess from a row's hidden state has the logits
    `E out(silu(hidden_in(h) + token_in(e) + depth_in_j))`, where `E` are the listed tokens' rows of
    the target's output layer.

    Args:
        hidden_in: weights for the row's hidden state, `[width, d_model]`.
        token_in: weights for the embeddings of the `tokens` tokens before the guessed one, the
            last one first, `[width, tokens * d_model]`.
        depth_in: one vector for each depth, `[depths, width]`.
        out: weights of the second layer, `[d_model, width]`.
        listed: ids of the tokens that may be guessed, `[K]`.
    """

    NAMES = ("hidden_in", "token_in", "depth_in", "out", "listed")
    listed: Tensor

    def __init__(
        self, hidden_in: Tensor, token_in: Tensor, depth_in: Tensor, out: Tensor, listed: Tensor
    ) -> None:
        super().__init__()
        self.hidden_in = nn.Parameter(hidden_in)
        self.token_in = nn.Parameter(token_in)
        self.depth_in = nn.Parameter(depth_in)
        self.out = nn.Parameter(out)
        self.register_buffer("listed", listed.long())

    @classmethod
    def start(
        cls, d_model: int, width: int, tokens: int, depths: int, listed: Tensor, seed: int = 0
    ) -> DraftHead:
        """Return an untrained head, which gives all listed tokens the same logit: `out` is zero.

        Args:
            d_model: size of a hidden state.
            width: size of the hidden layer.
            tokens: number of tokens before the guessed one that it is conditioned on.
            depths: number of tokens that can be guessed from one hidden state.
            listed: ids of the tokens that may be guessed, `[K]`.
            seed: seed of the random first layer.
        """
        generator = torch.Generator().manual_seed(seed)
        hidden_in = torch.randn(width, d_model, generator=generator) / d_model**0.5
        token_in = torch.randn(width, tokens * d_model, generator=generator)
        return cls(
            hidden_in,
            token_in / (tokens * d_model) ** 0.5,
            torch.zeros(depths, width),
            torch.zeros(d_model, width),
            listed,
        )

    @property
    def width(self) -> int:
        """Size of the hidden layer."""
        return int(self.out.shape[1])

    @property
    def tokens(self) -> int:
        """Number of tokens before the guessed one that it is conditioned on."""
        return int(self.token_in.shape[1]) // int(self.hidden_in.shape[1])

    @property
    def depths(self) -> int:
        """Number of tokens that can be guessed from one hidden state."""
        return len(self.depth_in)

    def description(self) -> dict[str, int]:
        """Return the head's sizes, as the look-ahead card lists them."""
        return {
            "width": self.width,
            "tokens": self.tokens,
            "depths": self.depths,
            "listed": len(self.listed),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all stored tensors by the names they are stored under."""
        return {f"head.{name}": getattr(self, name) for name in self.NAMES}

    def logits(self, hidden: Tensor, before: Tensor, depth: Tensor, outputs: Tensor) -> Tensor:
        """Return the logits of the listed tokens, `[R, K]`, for training.

        Args:
            hidden: inputs of the target's output layer for real rows, `[R, d_model]`.
            before: input embeddings of the tokens before the guessed ones, the last one first,
                `[R, tokens, d_model]`.
            depth: number of the guess from its hidden state, from 1, `[R]`.
            outputs: rows of the target's output layer for the listed tokens, `[K, d_model]`.
        """
        hidden, before, outputs = (rows.to(self.out.dtype) for rows in (hidden, before, outputs))
        from_hidden = nn.functional.linear(normed(hidden), self.hidden_in)
        from_tokens = nn.functional.linear(normed(before).flatten(-2), self.token_in)
        inner = nn.functional.silu(from_hidden + from_tokens + self.depth_in[depth - 1])
        return nn.functional.linear(nn.functional.linear(inner, self.out), outputs)


@dataclass(frozen=True)
class AppliedHead:
    """A draft head for decoding with one target: copies without gradients.

    Attributes:
        hidden_in: layer for hidden states, `[N, d_model]` to `[N, width]`.
        token_in: layer for the embeddings of previous tokens, `[N, tokens * d_model]` to
            `[N, width]`.
        out: second layer, `[N, width]` to `[N, d_model]`.
        outputs: the target's output layer for the listed tokens, `[N, d_model]` to `[N, K]`.
        depth_in: one vector for each depth, `[depths, width]`.
        listed: ids of the listed tokens, `[K]`.
        inputs: input embeddings of the target, `[V, d_model]`.
        scales: factors that give each embedding a root mean square of 1, `[V]` float32.
        tokens: number of tokens before the guessed one that the head is conditioned on.
    """

    hidden_in: nn.Module
    token_in: nn.Module
    out: nn.Module
    outputs: nn.Module
    depth_in: Tensor
    listed: Tensor
    inputs: Tensor
    scales: Tensor
    tokens: int

    @classmethod
    def of(cls, head: DraftHead, tables: Embeddings, dtype: torch.dtype) -> AppliedHead:
        """Return a head for a target with these embedding tables.

        On a CPU, rows are float32. Where our own products are the fastest, weights are int8, since
        reading them takes most of the time, and a row's result does not depend on the rows beside
        it.

        Args:
            head: the trained head.
            tables: the target's embedding tables.
            dtype: the target's type.
        """
        device = tables.inputs.device
        rows = torch.float32 if device.type == "cpu" else dtype
        ours = device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and preferred()

        def product(weight: Tensor) -> nn.Module:
            weight = weight.detach().to(device, rows, copy=True)
            return RowsProduct(*rounded(weight)) if ours else _Linear(weight)

        listed = head.listed.to(device)
        return cls(
            product(head.hidden_in),
            product(head.token_in),
            product(head.out),
            product(tables.outputs[listed]),
            head.depth_in.detach().to(device, rows, copy=True),
            listed,
            tables.inputs,
            scales(tables.inputs),
            head.tokens,
        )

    @property
    def depths(self) -> int:
        """Number of tokens that can be guessed from one hidden state."""
        return len(self.depth_in)

    def logits(self, from_hidden: Tensor, last: Tensor, depth: int) -> Tensor:
        """Return the logits of the listed tokens, `[N, K]`.

        Args:
            from_hidden: the hidden states' part of the first layer, `[N, width]`.
            last: ids of the last tokens of each sequence, the last one first, `[N, tokens]`.
            depth: number of the guess from its hidden state, from 0.
        """
        before = self.inputs[last].to(from_hidden) * self.scales[last, None].to(from_hidden)
        inner = from_hidden + self.token_in(before.flatten(-2)) + self.depth_in[depth]
        logits: Tensor = self.outputs(self.out(nn.functional.silu(inner)))
        return logits

    @cached_property
    def places(self) -> Tensor:
        """`listed` on the CPU, where noise is computed."""
        return self.listed.cpu()

    @cached_property
    def joint(self) -> list[Tensor] | None:
        """Arguments of the operator that makes all guesses in one call.

        None where there is no such operator, or it does not support the type or the layout of the
        target's embeddings.
        """
        layers = [self.hidden_in, self.token_in, self.out, self.outputs]
        ours = [layer for layer in layers if isinstance(layer, RowsProduct)]
        if len(ours) < len(layers) or not fit_operators(self.inputs):
            return None
        weights = [part for layer in ours for part in (layer.packed, layer.scale)]
        return [*weights[:4], self.depth_in, *weights[4:], self.listed, self.inputs]


class _Linear(nn.Module):
    """A linear layer without bias whose weights are not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.get_buffer("weight"))


class HeadSampler:
    """Logits and guesses of a draft head for several sequences, one token after the other.

    Has the same interface as `GroupSampler`; see `drawing.Sampler`.

    Args:
        head: the head.
        hidden: hidden state of each sequence's last accepted row, `[d_model]` each.
        lengths: number of tokens to draft for each sequence, at most the head's depths.
    """

    def __init__(self, head: AppliedHead, hidden: Sequence[Tensor], lengths: Sequence[int]) -> None:
        self._head = head
        self.lengths = list(lengths)
        self._hidden = torch.stack(list(hidden))

    @cached_property
    def _from_hidden(self) -> Tensor:
        """The hidden states' part of the first layer, `[N, width]`."""
        hidden = normed(self._hidden.to(self._head.depth_in.dtype))
        from_hidden: Tensor = self._head.hidden_in(hidden)
        return from_hidden

    def shortlists(
        self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[list[Shortlist], Tensor]:
        """Return the shortlists and logits at one depth; see `GroupSampler.shortlists`."""
        head = self._head
        logits = self._logits(depth, groups, histories)
        best, places = shortlist(logits, min(SHORTLIST, len(head.listed)))
        vocabulary = len(head.inputs)
        return [Shortlist(own, vocabulary) for own in head.listed[places]], best

    def likeliest(
        self, histories: Sequence[Sequence[int]], draws: Draws | None = None
    ) -> list[list[tuple[int, float]]]:
        """Return the likeliest tokens of each sequence and the head's probability of each.

        The judge draws the token of the largest `l - T log e`, with noise `e` (the Gumbel-max
        trick). A drafter that knows the noise therefore guesses better.

        Args:
            histories: token ids of each sequence so far.
            draws: sampling noise of the next positions, for the listed tokens; the guesses and
                their probabilities are then those of `Draws.perturb`'s logits. None for the
                likeliest tokens without it.
        """
        if self._head.joint is not None and fit_operators(self._hidden):
            return self._by_operator(histories, self._head.joint, draws)
        guesses: list[list[tuple[int, float]]] = [[] for _ in histories]
        last = [list(history[-self._head.tokens :]) for history in histories]
        for depth in range(max(self.lengths)):
            active = [at for at, length in enumerate(self.lengths) if depth < length]
            logits = self._logits(depth, active, [last[at] for at in active]).float()
            if draws is not None:
                logits = draws.perturb(logits, active, depth)
                logits = logits / draws.softmax_temperatures[active, None].to(logits)
            places = likeliest(logits)
            best = logits.gather(1, places[:, None]) - logits.logsumexp(-1, keepdim=True)
            tokens = self._head.listed[places].tolist()
            for at, token, sure in zip(active, tokens, best[:, 0].exp().tolist(), strict=True):
                guesses[at].append((token, sure))
                last[at].append(token)
        return guesses

    def _by_operator(
        self, histories: Sequence[Sequence[int]], head: Sequence[Tensor], draws: Draws | None
    ) -> list[list[tuple[int, float]]]:
        last = last_tokens(histories, self._head.tokens, self._hidden.device)
        lengths, threads = torch.tensor(self.lengths), torch.get_num_threads()
        noise: tuple[Tensor, ...] = (torch.empty(0),) * 3
        if draws is not None:
            noise = draws.noise, draws.scales, draws.softmax_temperatures
        tokens, sure = torch.ops.passlm.guesses(self._hidden, last, lengths, *head, *noise, threads)
        found = zip(tokens.tolist(), sure.tolist(), self.lengths, strict=True)
        return [list(zip(ids[:n], chances[:n], strict=True)) for ids, chances, n in found]

    def _logits(
        self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> Tensor:
        head, hidden = self._head, self._from_hidden
        if list(groups) != list(range(len(hidden))):
            hidden = hidden[list(groups)]
        last = last_tokens(histories, head.tokens, head.listed.device)
        return head.logits(hidden, last, depth)


class DraftHeadDrafter:
    """Drafts with a draft head, from the hidden state of each sequence's last accepted row.

    Args:
        head: the head.
    """

    source: Source = "head"

    def __init__(self, head: AppliedHead) -> None:
        self.head = head
        self._hidden: WeakKeyDictionary[DraftSequence, Tensor] = WeakKeyDictionary()

    def hidden(self, sequence: DraftSequence) -> Tensor | None:
        """Return the hidden state of the last accepted row, `[d_model]`; None before a pass."""
        return self._hidden.get(sequence)

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        """Return guesses for each sequence, in the number that its strategy asks for."""
        chains: list[Chain | None] = [None] * len(sequences)
        lengths = [
            0 if one not in self._hidden else min(self.head.depths, one.draft_length(self.source))
            for one in sequences
        ]
        asked = [at for at, length in enumerate(lengths) if length]
        for guessing, using in by_guessing([sequences[at] for at in asked]):
            places = [asked[at] for at in using]
            some, wanted = [sequences[at] for at in places], [lengths[at] for at in places]
            drafted = self._guess(guessing, some, wanted)
            for at, chain in zip(places, drafted, strict=True):
                chains[at] = chain
        return chains

    def _guess(
        self, guessing: Guessing, sequences: Sequence[DraftSequence], lengths: Sequence[int]
    ) -> list[Chain]:
        head, hidden = self.head, [self._hidden[sequence] for sequence in sequences]
        sampler = HeadSampler(head, hidden, lengths)
        if guessing == "drawn":
            return [draft.chain for draft in draw_together(sequences, sampler, self.source, True)]
        noise = None
        if guessing == "knowing":
            noise = known_noise(sequences, lengths, len(head.inputs), head.places, sureness=True)
        guesses = sampler.likeliest([sequence.tokens for sequence in sequences], noise)
        return [
            Chain(tokens, self.source, sureness=sureness)
            for tokens, sureness in (zip(*own, strict=True) for own in guesses)
        ]

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        """Keep the hidden state of each sequence's last accepted row."""
        for one in verified:
            if output.hidden is None:
                self._hidden.pop(one.sequence, None)
            else:
                self._hidden[one.sequence] = output.hidden[one.batch_row][one.accepted]


def scales(embeddings: Tensor) -> Tensor:
    """Return the factor that `normed` applies to each embedding, `[V]` float32.

    The table is not copied.
    """
    lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.float32)
    return (lengths.square() / embeddings.shape[1] + EPSILON).rsqrt()
