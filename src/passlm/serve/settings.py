"""Settings of the web side; those of the worker are in `protocol.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from passlm.errors import InputError


class SettingsError(InputError):
    """A setting that cannot be used; the message is one line and says how to fix it."""


@dataclass(frozen=True)
class ServeSettings:
    """Limits, names and options of the web side.

    Raises:
        SettingsError: a limit is too small.
    """

    model_name: str | None = field(
        default=None, metadata={"help": "name of the model in the API; default the name of --model"}
    )
    max_tokens: int = field(
        default=2048,
        metadata={"help": "maximum new tokens of a sequence; also the default of chat requests"},
    )
    max_prompt_tokens: int = field(
        default=0,
        metadata={"help": "maximum tokens of a prompt; 0 for no limit other than --max-context"},
    )
    max_texts: int = field(
        default=16, metadata={"help": "maximum sequences of one request, its prompts times n"}
    )
    max_stops: int = field(default=16, metadata={"help": "maximum stop strings of one request"})
    max_logit_bias: int = field(default=300, metadata={"help": "maximum tokens in logit_bias"})
    max_body: int = field(default=1 << 20, metadata={"help": "maximum size of a request in bytes"})
    read_seconds: float = field(
        default=30.0, metadata={"help": "time within which a request must arrive"}
    )
    write_seconds: float = field(
        default=60.0, metadata={"help": "disconnect a client that reads nothing for this long"}
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata={"help": "allow pages of this origin to use the API; may be given several times"},
    )
    log_prompts: bool = field(default=False, metadata={"help": "write prompts to the log"})
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """If there are any, each request to the API must send one of them."""

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
