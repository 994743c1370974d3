"""The training loop: many anchors a text from one pass over it, checkpoints, held-out figures.

What is trained is a `LookAhead`; the target stays frozen. Texts come from `data.py`, losses from
`loss.py`, progress bars and files for people from the command line.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from passlm.errors import InputError
from passlm.lookahead import LookAhead
from passlm.plan import Layout, Plan, make_layout
from passlm.provenance import write_atomically
from passlm.target import Target
from passlm.train.config import TrainConfig
from passlm.train.data import TokenWindows
from passlm.train.loss import accepted_lengths, greedy_hits, loss_of

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"
EVALUATION_GROUPS = 32  # whole groups on each held-out text


class TrainingError(InputError):
    """Training cannot start or go on; the message is one line and says what to do."""


@dataclass(frozen=True)
class Progress:
    """What a step gave.

    Attributes:
        step: steps done.
        loss: of this step, nats a row.
        learning_rate: of this step.
        seconds: since the run, resumed or not, began.
        accepted_length: held-out, over whole groups, at steps where it was measured.
        accepted_by_position: held-out share of the groups that reach past each row.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    accepted_length: float | None = None
    accepted_by_position: tuple[float, ...] | None = None


class Trainer:
    """Trains look-ahead rows for one target.

    Args:
        target: the frozen model.
        look_ahead: what to train, from its present values on.
        windows: texts to train on.
        held_out: texts to measure on, never trained on.
        config: the settings.
        folder: where checkpoints and the history go.
    """

    def __init__(
        self,
        target: Target,
        look_ahead: LookAhead,
        windows: TokenWindows,
        held_out: TokenWindows,
        config: TrainConfig,
        folder: Path,
    ) -> None:
        self.target = target
        self.look_ahead = look_ahead
        self.windows = windows
        self.held_out = held_out
        self.config = config
        self.folder = folder
        self.steps_done = 0
        self.seconds = 0.0
        self.optimizer = torch.optim.Adam([look_ahead.embeddings], lr=config.learning_rate)

    @property
    def groups_seen(self) -> int:
        """Look-ahead groups, that is anchors, trained on so far."""
        return self.steps_done * self.config.sequences * self.config.anchors

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Train to the last step, giving each step's figures; checkpoints are kept on the way.

        Args:
            stop: asked after each step; True keeps a checkpoint and ends.

        Raises:
            TrainingError: the loss is no number; the last checkpoint stays.
        """
        self._cut_history()
        begun = time.perf_counter() - self.seconds
        while self.steps_done < self.config.steps:
            rate = self._rate(self.steps_done)
            loss = self._step(rate)
            self.steps_done += 1
            self.seconds = time.perf_counter() - begun
            progress = Progress(self.steps_done, loss, rate, self.seconds)
            last = self.steps_done == self.config.steps
            if last or self.steps_done % self.config.evaluate_every == 0:
                progress = self._evaluated(progress)
            self._record(progress)
            stopping = stop()
            if last or stopping or self.steps_done % self.config.checkpoint_every == 0:
                self.save_checkpoint()
            yield progress
            if stopping:
                return

    def _step(self, rate: float) -> float:
        config = self.config
        text = self.windows.batch(self.steps_done, config.sequences).to(self.target.device)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.steps_done)
        layouts = [anchored(config.sequence_tokens, group_lengths(config), generator) for _ in text]
        hung = self.target.hang(text, layouts, self.look_ahead.embeddings)
        loss = loss_of(config.loss, hung, text)
        value = float(loss.detach())
        self._check_finite("loss", value)
        # Not backward(): it would leave gradients on a target whose weights ask for them.
        (gradient,) = torch.autograd.grad(loss, [self.look_ahead.embeddings])
        self._check_finite("gradient", float(gradient.norm()))
        self.look_ahead.embeddings.grad = gradient
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return value

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
        return Progress(
            progress.step,
            progress.loss,
            progress.learning_rate,
            progress.seconds,
            accepted_length=sum(share),
            accepted_by_position=tuple(share),
        )

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Held-out share of the groups accepted up to and past each row, greedy, teacher-forced.

        Their sum is the accepted length.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        rows = config.lookahead_tokens
        groups = min(EVALUATION_GROUPS, config.sequence_tokens - rows - 1)
        lengths: list[Tensor] = []
        for index in range(config.evaluate_texts):
            text = self.held_out.window(index)[None].to(self.target.device)
            layout = anchored(config.sequence_tokens, [rows] * groups, generator)
            hung = self.target.hang(text, [layout], self.look_ahead.embeddings)
            lengths.append(accepted_lengths(greedy_hits(hung)[0], hung.depth[0]))
        counted = torch.cat(lengths)
        return [float((counted >= row).float().mean()) for row in range(1, rows + 1)]

    def _record(self, progress: Progress) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(progress)) + "\n")

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.config), "data": self.windows.fingerprint()}

    def save_checkpoint(self) -> None:
        """Keep all that an exact continuation needs, in one file, whole or not at all."""
        state = self.optimizer.state[self.look_ahead.embeddings]
        tensors = {"embeddings": self.look_ahead.embeddings.detach()}
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
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
            embeddings = tensors.pop("embeddings")
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
        mine, target = self.look_ahead.embeddings, json.dumps(asdict(self.look_ahead.card.target))
        if embeddings.shape != mine.shape or about.get("target", target) != target:
            raise TrainingError(
                f"{path} was made for another model, or for this one in another dtype: resume "
                "with the one it was made for"
            )
        mine.data.copy_(embeddings)
        self.optimizer.state[mine] = {
            name.removeprefix("optimizer."): value.to(mine.device)
            for name, value in tensors.items()
        }
        self.steps_done, self.seconds = steps_done, seconds

    def _cut_history(self) -> None:
        """Drop the steps after the checkpoint: they are done again."""
        kept = [p for p in read_history(self.folder) if p.step <= self.steps_done]
        lines = io.StringIO()
        for progress in kept:
            lines.write(json.dumps(asdict(progress)) + "\n")
        write_atomically(self.folder / HISTORY, lines.getvalue())


def _change(name: str, kept: object, now: object) -> str:
    if name == "data":  # hashes, which say nothing to people
        return "the text or its weights differ"
    return f"{name} was {kept}, is {now}"


def group_lengths(config: TrainConfig) -> list[int]:
    """Lengths of a text's groups: of each row's groups a share `keep` goes on to the next row.

    Later rows are reached less often in decoding and cost as much to train (the conditional drop
    of PARD, arXiv 2504.18583). The numbers are the same for every text, so that texts stack.
    """
    reach = [round(config.anchors * config.keep**row) for row in range(config.lookahead_tokens)]
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
