"""Training loop: many anchors per pass over a sequence, checkpoints, held-out evaluation.

A `LookAhead` is trained; the target stays frozen. Sequences come from `data.py`, losses from
`loss.py`. Progress bars, model card and curves are left to the command line.
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
EVALUATION_GROUPS = 32  # complete groups per held-out sequence
BETAS = (0.9, 0.99)  # of Adam: runs are short, and averaging over about 100 steps is enough
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class TrainingError(InputError):
    """Training that cannot start or continue; a one-line message that says what to do."""


@dataclass(frozen=True)
class Progress:
    """Results of one step.

    Attributes:
        step: Number of steps done.
        loss: Loss of this step, in nats per row.
        learning_rate: Rate of the embeddings in this step; the other rates are proportional.
        gradient_norm: Norm before clipping.
        seconds: Training time so far, including the time before a resume.
        accepted_length: Mean over complete groups of held-out text; None at steps without an
            evaluation.
        accepted_by_position: Share of held-out groups accepted up to and including each row.
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
        """Index of this process, from 0, and the number of processes."""

    def average(self, loss: float, parameters: Mapping[str, Tensor]) -> float:
        """Replace every gradient by its mean over all processes; return the mean loss."""

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""


class Trainer:
    """Trainer of look-ahead rows for one target.

    Args:
        target: Frozen model.
        look_ahead: Parameters to train, starting from their current values.
        windows: Training sequences.
        held_out: Sequences for evaluation only.
        config: Settings of the run.
        folder: Folder of checkpoints and history.
        processes: Processes that share each step; None for this process alone.
        started_from: Hash of the files that training starts from; empty for a fresh start.

    Raises:
        UnsupportedModelError: The target's logits cannot be computed from its hidden states.
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
        """Return the parameters to train, by name."""
        return dict(look_ahead.named_parameters())

    def rated(self, look_ahead: LookAhead) -> list[dict[str, Any]]:
        """Return Adam's parameter groups, each with its peak learning rate."""
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
        """Number of look-ahead groups (anchors) trained on so far."""
        texts = self.steps_done * self.config.accumulate * self.config.sequences
        processes = 1 if self.processes is None else self.processes.place[1]
        return texts * processes * self.config.anchors

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Train to the last step, save checkpoints, and yield the results of each step.

        The first checkpoint is saved before the first step, so that any interrupted run can resume.

        Args:
            stop: Called after each step; if it returns True, save a checkpoint and end.

        Raises:
            TrainingError: Loss or gradient is not finite; the last checkpoint stays.
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
        """Run one step of the optimiser; return the loss and the norm of the gradient."""
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
        """Add the gradients of a step's mean loss to the parameters; return that loss.

        Sequences and anchors of a step do not depend on how it is split into processes and batches.
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
        """Return the windows of these numbers, `[B, S]`, and the rows to train on them."""
        text = torch.stack([self.windows.window(i) for i in windows]).to(self.target.device)
        return text, self.hang(text, [self._layout(index) for index in windows])

    def hang(self, text: Tensor, layouts: Sequence[Layout]) -> Hung:
        """Return the rows to train, attached to sequences `[B, S]`."""
        return look_ahead_pass(
            self.target, text, layouts, self._rows, self.config.gradient_checkpointing
        )

    def _layout(self, window: int) -> Layout:
        config = self.config
        return anchored(config.sequence_tokens, group_lengths(config), self.drawing(window))

    def drawing(self, window: int) -> torch.Generator:
        """Return the random generator that draws the anchors of a window."""
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + window) % 2**63)

    def _backward(self, hung: Hung, text: Tensor) -> float:
        """Add a batch's gradients part by part; return its mean loss."""
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
            # Explicit inputs: a target whose weights require gradients must not collect any.
            torch.autograd.backward(loss / self.config.accumulate, inputs=[part.hidden, *heads])
            assert part.hidden.grad is not None, "the loss depends on the hidden states"
            gradient[place] = part.hidden.grad
            total += float(loss.detach())
        torch.autograd.backward(hung.hidden, gradient.view_as(hung.hidden), inputs=others)
        return total

    def _guesses(self, part: Part) -> tuple[Guess, Guess]:
        """Return predictions before and after the sampler head; the same object without one."""
        guess = part.guess(self.target)
        if self.look_ahead.sampler is None or self._tables is None:
            return guess, guess
        return guess, part.weighed(guess, self.look_ahead.sampler, self._tables)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} is {value} at step {self.steps_done + 1}: train with a lower "
                f"--learning-rate; a checkpoint in {self.folder} is older and valid"
            )

    def _rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up, then a cosine down to 1 % of the peak."""
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
        """Return the share of held-out groups accepted up to and including each row.

        Greedy and teacher-forced. The sum of the shares is the accepted length.
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
        """True if this process writes the files."""
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
        """Write all state for an exact continuation to one file, completely or not at all."""
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
        """Continue from the folder's checkpoint; the result equals that of an uninterrupted run.

        Raises:
            TrainingError: There is no checkpoint, it is damaged, or it was made with other
                settings; the message says which differ.
        """
        path = self.folder / CHECKPOINT
        tensors, about = _read_checkpoint(path)
        now = self._settings()
        try:
            kept = json.loads(about["settings"])
            steps_done, seconds = int(about["steps_done"]), float(about["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{path} is damaged (invalid or missing {error}): start again with --overwrite"
            ) from error
        different = [name for name in now if kept.get(name) != now[name]]
        if different:
            changes = ", ".join(_change(n, kept.get(n), now[n]) for n in different)
            raise TrainingError(
                f"{path} was made with other settings: {changes}; give those, or start again "
                "with --overwrite"
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
        """Drop the steps after the checkpoint, because they are repeated."""
        if not self.writes:
            return
        kept = [p for p in read_history(self.folder) if p.step <= self.steps_done]
        lines = io.StringIO()
        for progress in kept:
            lines.write(json.dumps(asdict(progress)) + "\n")
        write_atomically(self.folder / HISTORY, lines.getvalue())


def check_logits(target: Target) -> None:
    """Check that logits computed from hidden states equal the model's own.

    Raises:
        UnsupportedModelError: They differ.
    """
    layout = make_layout(Plan(1, (0, 1)))
    rows = LookAheadRows(target.embed(torch.tensor([0], device=target.device)))
    text = torch.tensor([[0, 1]], device=target.device)
    with torch.no_grad():
        ours = target.logits(look_ahead_pass(target, text, [layout], rows).text_hidden).float()
        truth = target.model(input_ids=text, use_cache=False).logits.float()
    if not torch.allclose(ours, truth, rtol=0.02, atol=0.02 * float(truth.abs().max())):
        raise UnsupportedModelError(
            f"{type(target.model).__name__} computes logits from more than its last hidden states: "
            "look-ahead rows cannot be trained for it"
        )


def _change(name: str, kept: object, now: object) -> str:
    if name == "data":  # hashes, which tell the reader nothing
        return "the text or its weights differ"
    if name == "start":
        return "--start-from is another"
    return f"{name} was {kept}, is {now}"


def group_lengths(config: TrainConfig) -> list[int]:
    """Return the group lengths of a sequence: a share `keep` of the groups continues at each row.

    Decoding reaches later rows less often, but they cost as much to train (the conditional drop of
    PARD, arXiv 2504.18583). The lengths are the same for every sequence, so that sequences stack.
    """
    reach = [round(config.anchors * config.keep**row) for row in range(config.reach)]
    return [sum(1 for count in reach if index < max(count, 1)) for index in range(config.anchors)]


def anchored(tokens: int, lengths: Sequence[int], generator: torch.Generator) -> Layout:
    """Return the layout of a sequence with groups of these lengths on random real rows.

    Args:
        tokens: Length of the sequence, `S`.
        lengths: Lengths of the groups; anchors are chosen so that every group fits.
        generator: Random generator that draws the anchors.
    """
    places = tokens - max(lengths) - 1  # the last row needs a token to predict
    chosen = torch.randperm(places, generator=generator)[: len(lengths)].tolist()
    groups = [0] * tokens
    for place, length in zip(chosen, lengths, strict=True):
        groups[place] = length
    return make_layout(Plan(tokens - 1, tuple(groups)))  # not cached: random layouts do not recur


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TrainingError(f"no checkpoint {path}: leave out --resume to start a new run")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        return load_file(path), about
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged ({error}): start again with --overwrite") from error


def read_history(folder: Path) -> list[Progress]:
    """Return the results of all steps recorded in a folder, in order."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A last line without a newline is incomplete: the run was interrupted.
    return [Progress(**json.loads(line)) for line in lines if line.endswith("\n")]
