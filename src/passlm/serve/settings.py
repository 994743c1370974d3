"""What the web side allows and tells; what the worker takes on is in `protocol.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from passlm.errors import InputError


class SettingsError(InputError):
    """A setting of the server that cannot be used; one line that names the cure."""


@dataclass(frozen=True)
class ServeSettings:
    """Limits, names and habits of the web side.

    Raises:
        SettingsError: a limit is not positive.
    """

    model_name: str | None = field(
        default=None, metadata={"help": "what clients call the model; default the name of --model"}
    )
    max_tokens: int = field(
        default=2048, metadata={"help": "new tokens a request may ask for, and gets if it does not"}
    )
    max_prompt_tokens: int = field(
        default=0, metadata={"help": "tokens of a prompt; 0 leaves it to --max-context"}
    )
    max_texts: int = field(
        default=16, metadata={"help": "texts of one request, its prompts times n"}
    )
    max_stops: int = field(default=16, metadata={"help": "stop strings of one request"})
    max_logit_bias: int = field(default=300, metadata={"help": "tokens that logit_bias may name"})
    max_body: int = field(default=1 << 20, metadata={"help": "bytes of a request"})
    read_seconds: float = field(
        default=30.0, metadata={"help": "a request must have arrived after this long"}
    )
    write_seconds: float = field(
        default=60.0, metadata={"help": "a client that reads nothing for this long is left"}
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata={"help": "let pages of this origin use the API; may be given several times"},
    )
    log_prompts: bool = field(default=False, metadata={"help": "write prompts to the log"})
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """One of them must come with each request, where there are any."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.type in ("int", "float") and limit.name != "max_prompt_tokens" and value <= 0:
                flag = limit.name.replace("_", "-")
                raise SettingsError(f"--{flag} is {value}: it must be more than 0")
        if self.max_prompt_tokens < 0:
            raise SettingsError(
                f"--max-prompt-tokens is {self.max_prompt_tokens}: it must be 0 or more"
            )
