"""Field types shared by all sections: strict where YAML has accidents, lenient where it has none.

A quoted "1e-6" is a number where one is expected, `true` and `false` are on and off where these are; Python takes
True for 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Kind = Literal["identity", "learning", "running"]


@dataclass(frozen=True)
class Changing:
    """What it means to continue a run with another value of a setting (docs/changing.md).

    kind: `identity`, it is another run then; `learning`, the same run learns otherwise from then on; `running`, only
    where, how fast and how talkative. reason: of identity, what the change would break. branch: of identity, whether a
    branch, which is a run of its own, may have another value all the same: nothing in a checkpoint depends on it.
    """

    kind: Kind
    reason: str = ""
    branch: bool = False


LEARNING, RUNNING = Changing("learning"), Changing("running")


def identity(reason: str, *, branch: bool = False) -> Changing:
    """The mark of a setting that makes a run this run; see `Changing`."""
    return Changing("identity", reason, branch)


class Section(BaseModel):
    """Base of all sections: frozen, strict types, unknown keys refused.

    changing: of the section's fields that say nothing themselves (`Learning[...]`, `Running[...]`, `identity(...)`).
    """

    changing: ClassVar[Changing]

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _number(value: Any) -> Any:
    if isinstance(value, str) and "_" not in value:  # which Python would take, and YAML 1.2 has not
        try:
            return float(value)
        except ValueError:
            return value  # pydantic's strict float refuses it and shows the value
    return value


_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def _duration(value: Any) -> Any:
    """Seconds of a number, of [days-]hours:minutes:seconds as schedulers write it, or of units: 3h55m."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return float(value)
    except ValueError:
        pass
    match = _CLOCK.fullmatch(value.strip()) or _UNITS.fullmatch(value.replace(" ", ""))
    if match is None:
        raise ValueError(
            f"expected seconds, or text such as '3:55:00' (h:mm:ss), '1-00:00:00' (days) or 3h55m; got {value!r}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _path(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("expected a path, got an empty string")
        return Path(value)
    return value


def _paths(value: Any) -> Any:
    if isinstance(value, str | Path):
        value = [value]
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("expected a path or a list of paths, got an empty list")
        if not all(isinstance(item, str | Path) for item in value):
            raise ValueError("expected a path or a list of paths")
        return tuple(_path(item) for item in value)
    if value is None:
        return value
    raise ValueError("expected a path or a list of paths")


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _token_ids(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else _tuple(value)


def _function_name(value: str) -> str:
    place, colon, function = value.rpartition(":")
    if not (colon and place and function.isidentifier()):
        raise ValueError("expected 'path/to/file.py:function' or 'package.module:function'")
    return value


def _score_token(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("expected a token such as '<|vision_start|>' or a token id of 0 or more")


def _reward(value: str) -> str:
    module, colon, function = value.rpartition(":")
    if colon and not (module and function.isidentifier()):
        raise ValueError(
            "expected a registered name, 'package.module:function' or 'path/to/file.py:function'"
        )
    return value


_RENDERING = (
    *(
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)


def _template_arguments(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if not name.isidentifier():
            raise ValueError(f"expected names of variables, such as enable_thinking; {name!r} is none")
        if name in _RENDERING:
            raise ValueError(f"expected variables of the template; {name!r} belongs to the rendering itself")
    return value


def _switch(value: Any) -> Any:
    """As YAML 1.1 reads on and off."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


T = TypeVar("T")
Learning = Annotated[T, LEARNING]
Running = Annotated[T, RUNNING]
Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0.0)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0.0)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0.0, le=1.0)]
ClipLow = Annotated[float, BeforeValidator(_number), Field(gt=0.0, lt=1.0)]
TopP = Annotated[float, BeforeValidator(_number), Field(gt=0.0, le=1.0)]
MinP = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0)]
Decay = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0)]
Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, AfterValidator(_function_name)]
RewardName = Annotated[str, Field(min_length=1), AfterValidator(_reward)]
FilePath = Annotated[Path, BeforeValidator(_path)]
FilePaths = Annotated[tuple[Path, ...], BeforeValidator(_paths)]
OptionalFilePaths = Annotated[tuple[Path, ...] | None, BeforeValidator(_paths)]
TokenIds = Annotated[tuple[CountOrZero, ...], BeforeValidator(_token_ids), Field(min_length=1)]
LogProb = Annotated[float, BeforeValidator(_number), Field(lt=0.0)]
AtLeastOne = Annotated[float, BeforeValidator(_number), Field(ge=1.0)]
AboveOne = Annotated[float, BeforeValidator(_number), Field(gt=1.0)]
ScoreTokenSetting = Annotated[int | str | None, BeforeValidator(_score_token)]
NumberPair = Annotated[tuple[Number, Number], BeforeValidator(_tuple)]
DecayPair = Annotated[tuple[Decay, Decay], BeforeValidator(_tuple)]
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_template_arguments)]
Switch = BeforeValidator(_switch)
Strings = BeforeValidator(_strings)
