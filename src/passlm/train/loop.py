"""The training loop: many anchors a text from one pass over it, checkpoints, held-out figures.

What is trained is a `LookAhead`; the target stays frozen. Texts come from `data.py`, losses from
`loss.py`, progress bars and files for people from the command line.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from passlm.errors import InputError
from passlm.lookahead.trained import LookAhead
from passlm.model.pass_records import Hung, LookAheadRows
from passlm.model.supported import UnsupportedModelError
from passlm.model.target import Target
from passlm.model.training import look_ahead_pass
from passlm.plan import Layout, Plan, make_layout
from passlm.provenance import write_atomically
from passlm.train.config import TrainConfig
from passlm.train.data import TokenWindows
from passlm.train.loss import Guess, Part, accepted_lengths, parts, row_losses

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"
EVALUATION_GROUPS = 32  # whole groups on each held-out text
BETAS = (0.9, 0.99)  # of Adam: runs are short, and a mean over the last hundred steps is enough
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class TrainingError(InputError):
    """Training cannot start or go on; the message is one line and says what to do."""


@dataclass(frozen=True)
class Progress:
    """What a step gave.

    Attributes:
        step: steps done.
        loss: of this step, nats a row.
        learning_rate: of the embeddings in this step; others move with it.
        gradient_norm: before clipping.
        seconds: since the run, resumed or not, began.
        accepted_length: held-out, over whole groups, at steps where it was measured.
        accepted_by_position: held-out share of the groups that reach past each row.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    accepted_length: float | None = None
    accepted_by_position: tuple[float, ...] | None = None


class Processes(Protocol):
    """Several processes that train on the same steps; see `processes.py`."""

    @property
    def place(self) -> tuple[int, int]:
        """This one's number, from 0, and how many there are."""

    def average(self, loss: float, parameters: Mapping[str, Tensor]) -> float:
        """Every gradient becomes the mean over all processes; gives that of the loss."""

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""


class Trainer:
    """Trains look-ahead rows for one target.

    Args:
        target: the frozen model.
        look_ahead: what to train, from its present values on.
        windows: texts to train on.
        held_out: texts to measure on, never trained on.
        config: the settings.
        folder: where checkpoints and the history go.
        processes: who else trains on the same step; None for this process alone.
        started_from: a hash of the files that it goes on from; empty where it begins anew.

    Raises:
        UnsupportedModelError: logits cannot be had from the target's hidden states.
    """

    def __init__(
        self,
        target: Target,
        look_ahead: LookAhead,
        windows: TokenWindows,
        held_out: TokenWindows,
        config: TrainConfig,
        folder: Path,
        processes: Processes | None = None,
        started_from: str = "",
    ) -> None:
        self.target = target
        self.look_ahead = look_ahead.to(target.device)
        self.windows = windows
        self.held_out = held_out
        self.config = config
        self.folder = folder
        self.steps_done = 0
        self.seconds = 0.0
        self.processes = processes
        self.started_from = started_from
        self.parameters = self.trained(look_ahead)
        self.optimizer = torch.optim.Adam(self.rated(look_ahead), betas=BETAS)
        self._rows = look_ahead.trained_rows(target)
        self._tables = None if look_ahead.sampler is None else target.embeddings
        check_logits(target)

    def trained(self, look_ahead: LookAhead) -> dict[str, nn.Parameter]:
        """What the steps change, by name."""
        return dict(look_ahead.named_parameters())

    def rated(self, look_ahead: LookAhead) -> list[dict[str, Any]]:
        """Adam's parameter groups, each with its highest learning rate."""
        config = self.config
        rates = [(look_ahead.embeddings, config.learning_rate)]
        if look_ahead.lora is not None:
            rates += [(p, config.lora_learning_rate) for p in look_ahead.lora.parameters()]
        if look_ahead.sampler is not None:
            rates += [(p, config.sampler_learning_rate) for p in look_ahead.sampler.parameters()]
        highest = dict.fromkeys(rate for _, rate in rates)
        return [{"params": [p for p, r in rates if r == rate], "highest": rate} for rate in highest]

    @property
    def groups_seen(self) -> int:
        """Look-ahead groups, that is anchors, trained on so far."""
        texts = self.steps_done * self.config.accumulate * self.config.sequences
        processes = 1 if self.processes is None else self.processes.place[1]
        return texts * processes * self.config.anchors

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Train to the last step, giving each step's figures; checkpoints are kept on the way.

        The first one is of the beginning: whatever ends a run, it can be gone on with.

        Args:
            stop: asked after each step; True keeps a checkpoint and ends.

        Raises:
            TrainingError: the loss is no number; the last checkpoint stays.
        """
        if not self.steps_done:
            self.save_checkpoint()
        self._cut_history()
        begun = time.perf_counter() - self.seconds
        while self.steps_done < self.config.steps:
            rate = self._rate(self.steps_done)
            loss, norm = self._step(rate)
            self.steps_done += 1
            self.seconds = time.perf_counter() - begun
            progress = Progress(self.steps_done, loss, rate, norm, self.seconds)
            last = self.steps_done == self.config.steps
            if last or self.steps_done % self.config.evaluate_every == 0:
                progress = self._evaluated(progress)
            self._record(progress)
            stopping = stop() if self.processes is None else self.processes.any(stop())
            if last or stopping or self.steps_done % self.config.checkpoint_every == 0:
                self.save_checkpoint()
            yield progress
            if stopping:
                return

    def _step(self, rate: float) -> tuple[float, float]:
        """One step of the optimiser; gives the loss and the length of the gradient."""
        self.optimizer.zero_grad()
        loss = self.gradients(self.steps_done)
        self._check_finite("loss", loss)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self._check_finite("gradient", norm)
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.config.clip, torch.tensor(norm)
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * rate / self.config.learning_rate
        self.optimizer.step()
        return loss, norm

    def gradients(self, step: int) -> float:
        """Adds the gradients of a step's mean loss to the parameters; gives that loss.

        Texts and anchors of a step are the same however they are split over processes and batches.
        """
        config = self.config
        rank, count = (0, 1) if self.processes is None else self.processes.place
        total = 0.0
        for batch in range(config.accumulate):
            first = ((step * config.accumulate + batch) * count + rank) * config.sequences
            indices = range(first, first + config.sequences)
            text, hung = self.batch(indices)
            total += self._backward(hung, text) / config.accumulate
        if self.processes is None:
            return total
        return self.processes.average(total, self.parameters)

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Hung]:
        """Texts of these numbers, `[B, S]`, and the rows on them that are trained."""
        text = torch.stack([self.windows.window(i) for i in windows]).to(self.target.device)
        return text, self.hang(text, [self._layout(index) for index in windows])

    def hang(self, text: Tensor, layouts: Sequence[Layout]) -> Hung:
        """The rows that are trained, hung on some texts, `[B, S]`."""
        return look_ahead_pass(
            self.target, text, layouts, self._rows, self.config.gradient_checkpointing
        )

    def _layout(self, window: int) -> Layout:
        config = self.config
        return anchored(config.sequence_tokens, group_lengths(config), self.drawing(window))

    def drawing(self, window: int) -> torch.Generator:
        """What draws the anchors of a text."""
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + window) % 2**63)

    def _backward(self, hung: Hung, text: Tensor) -> float:
        """Adds a batch's share to the gradients, part by part; gives its mean loss."""
        weight = self.config.position_weight ** (hung.depth.flatten() - 1)
        scale = weight / weight.sum()
        sampler = self.look_ahead.sampler
        heads = [] if sampler is None else list(sampler.parameters())
        others = [p for p in self.parameters.values() if not any(p is head for head in heads)]
        gradient = torch.empty_like(hung.hidden).flatten(0, 1)
        total = 0.0
        kind, temperature = self.config.loss, self.config.teacher_temperature
        for place, part in parts(self.target, hung, text, temperature, gradients=True):
            guess, final = self._guesses(part)
            losses = row_losses(kind, guess, part)
            if final is not guess:
                losses = losses + row_losses(kind, final, part)
            loss = (losses * scale[place]).sum()
            # The inputs are named: a target whose weights ask for gradients is left alone.
            torch.autograd.backward(loss / self.config.accumulate, inputs=[part.hidden, *heads])
            assert part.hidden.grad is not None, "the loss depends on the hidden states"
            gradient[place] = part.hidden.grad
            total += float(loss.detach())
        torch.autograd.backward(hung.hidden, gradient.view_as(hung.hidden), inputs=others)
        return total

    def _guesses(self, part: Part) -> tuple[Guess, Guess]:
        """What the rows guess by themselves and in the end; one and the same without a sampler."""
        guess = part.guess(self.target)
        if self.look_ahead.sampler is None or self._tables is None:
            return guess, guess
        return guess, part.weighed(guess, self.look_ahead.sampler, self._tables)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} is {value} at step {self.steps_done + 1}: train with a lower "
                f"--learning-rate; a checkpoint kept in {self.folder} is from before and good"
            )

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        config = self.config
        if step < config.warmup:
            return config.learning_rate * (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def _evaluated(self, progress: Progress) -> Progress:
        share = self.evaluate()
        return replace(progress, accepted_length=sum(share), accepted_by_position=tuple(share))

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Held-out share of the groups accepted up to and past each row, greedy, teacher-forced.

        Their sum is the accepted length.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        rows = config.reach
        groups = min(EVALUATION_GROUPS, config.sequence_tokens - rows - 1)
        lengths: list[Tensor] = []
        for index in range(config.evaluate_texts):
            text = self.held_out.window(index)[None].to(self.target.device)
            layout = anchored(config.sequence_tokens, [rows] * groups, generator)
            hung = self.hang(text, [layout])
            lengths += [
                accepted_lengths(part.hits(self._guesses(part)[1]), part.depth)
                for _, part in parts(self.target, hung, text)
            ]
        counted = torch.cat(lengths)
        return [float((counted >= row).float().mean()) for row in range(1, rows + 1)]

    @property
    def writes(self) -> bool:
        """Whether files are this process's business."""
        return self.processes is None or self.processes.place[0] == 0

    def _record(self, progress: Progress) -> None:
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(progress)) + "\n")

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        processes = 1 if self.processes is None else self.processes.place[1]
        return {
            **settings,
            "processes": processes,
            "data": self.windows.fingerprint(),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "start": self.started_from,
        }

    def save_checkpoint(self) -> None:
        """Keep all that an exact continuation needs, in one file, whole or not at all."""
        if not self.writes:
            return
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{kind}.{name}": value for kind, value in state.items()}
        about = {
            "settings": json.dumps(self._settings()),
            "target": json.dumps(asdict(self.look_ahead.card.target)),
            "steps_done": str(self.steps_done),
            "seconds": str(self.seconds),
        }
        whole = save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata=about)
        write_atomically(self.folder / CHECKPOINT, whole)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, to the same result as an unbroken run.

        Raises:
            TrainingError: there is no checkpoint, it is damaged, or it was made with other
                settings; says which differ.
        """
        path = self.folder / CHECKPOINT
        tensors, about = _read_checkpoint(path)
        now = self._settings()
        try:
            kept = json.loads(about["settings"])
            steps_done, seconds = int(about["steps_done"]), float(about["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{path} is damaged (bad or missing {error}): start anew with --overwrite"
            ) from error
        different = [name for name in now if kept.get(name) != now[name]]
        if different:
            changes = ", ".join(_change(n, kept.get(n), now[n]) for n in different)
            raise TrainingError(
                f"{path} was made with other settings: {changes}; give those, or start anew with "
                "--overwrite"
            )
        target = json.dumps(asdict(self.look_ahead.card.target))
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        kept_shapes = {name: tuple(tensors[name].shape) for name in shapes if name in tensors}
        if kept_shapes != shapes or about.get("target", target) != target:
            raise TrainingError(
                f"{path} was made for another model, or for this one in another dtype: resume "
                "with the one it was made for"
            )
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
            self.optimizer.state[parameter] = {
                kind: tensors[f"optimizer.{kind}.{name}"].to(parameter.device)
                for kind in OPTIMIZER_STATE
                if f"optimizer.{kind}.{name}" in tensors
            }
        self.steps_done, self.seconds = steps_done, seconds

    def _cut_history(self) -> None:
        """Drop the steps after the checkpoint: they are done again."""
        if not self.writes:
            return
        kept = [p for p in read_history(self.folder) if p.step <= self.steps_done]
        lines = io.StringIO()
        for progress in kept:
            lines.write(json.dumps(asdict(progress)) + "\n")
        write_atomically(self.folder / HISTORY, lines.getvalue())


def check_logits(target: Target) -> None:
    """Make sure that logits come out of hidden states as they come out of the model itself.

    Raises:
        UnsupportedModelError: they do not.
    """
    layout = make_layout(Plan(1, (0, 1)))
    rows = LookAheadRows(target.embed(torch.tensor([0], device=target.device)))
    text = torch.tensor([[0, 1]], device=target.device)
    with torch.no_grad():
        ours = target.logits(look_ahead_pass(target, text, [layout], rows).text_hidden).float()
        truth = target.model(input_ids=text, use_cache=False).logits.float()
    if not torch.allclose(ours, truth, rtol=0.02, atol=0.02 * float(truth.abs().max())):
        raise UnsupportedModelError(
            f"{type(target.model).__name__} makes its logits of more than its last hidden states: "
            "look-ahead rows cannot be trained for it"
        )


def _change(name: str, kept: object, now: object) -> str:
    if name == "data":  # hashes, which say nothing to people
        return "the text or its weights differ"
    if name == "start":
        return "--start-from is another"
    return f"{name} was {kept}, is {now}"


def group_lengths(config: TrainConfig) -> list[int]:
    """Lengths of a text's groups: of each row's groups a share `keep` goes on to the next row.

    Later rows are reached less often in decoding and cost as much to train (the conditional drop
    of PARD, arXiv 2504.18583). The numbers are the same for every text, so that texts stack.
    """
    reach = [round(config.anchors * config.keep**row) for row in range(config.reach)]
    return [sum(1 for count in reach if index < max(count, 1)) for index in range(config.anchors)]


def anchored(tokens: int, lengths: Sequence[int], generator: torch.Generator) -> Layout:
    """The layout of a text with groups of these lengths hung on random real rows.

    Args:
        tokens: of the text, `S`.
        lengths: of the groups; all fit behind the last anchor.
        generator: draws the anchors.
    """
    places = tokens - max(lengths) - 1  # the last row still has a token to predict
    chosen = torch.randperm(places, generator=generator)[: len(lengths)].tolist()
    groups = [0] * tokens
    for place, length in zip(chosen, lengths, strict=True):
        groups[place] = length
    return make_layout(Plan(tokens - 1, tuple(groups)))  # random ones are not worth remembering


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TrainingError(f"no checkpoint {path}: leave out --resume to start")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        return load_file(path), about
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged ({error}): start anew with --overwrite") from error


def read_history(folder: Path) -> list[Progress]:
    """The figures of every step kept in a folder, in order."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without an end was being written when the run was cut off.
    return [Progress(**json.loads(line)) for line in lines if line.endswith("\n")]
