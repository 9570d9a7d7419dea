#!/usr/bin/env python
"""Write docs/configuration.md from the schema in megatron_laser/config, and the table of alarms in docs/observing.md.

python tools/generate_docs.py            # write it
python tools/generate_docs.py --check    # exit status 1 when it is not up to date
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_laser.config.schema.fields import Changing, Section  # noqa: E402
from megatron_laser.config.schema.kinds import mark_of  # noqa: E402
from megatron_laser.config.schema.root import RunConfig  # noqa: E402
from megatron_laser.observability.alarms import RULES  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"
COMMAND = "python tools/generate_docs.py"
ALARMS = ROOT / "docs" / "observing.md"
_ALARMS_BEGIN, _ALARMS_END = f"<!-- alarms: written by `{COMMAND}` -->\n", "<!-- end of alarms -->\n"
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
_INTRODUCTION = f"""# Configuration

<!-- Written by `{COMMAND}` from the schema in megatron_laser/config. Do not edit. -->

One YAML file per run: sections, and keys in them. How to write one, on top of another and with variables of the
environment, is in [configuring.md](configuring.md). Anything can be overridden on the command line as
`section.key=value` (values in YAML, lists and null too). Relative paths in the file start from the file's folder,
those in overrides from the working directory. Unknown keys are refused, with the nearest match. What a run used, all
defaults included, is written to `output_dir/config.yaml`.

"If changed" says what it is to continue a run with another value: `identity`, another run, which is refused;
`learning`, allowed with `train --change`; `running`, free. See [changing.md](changing.md).

```bash
megatron-laser train RUN.yaml optimizer.lr=2e-6 laser.enabled=false
megatron-laser check RUN.yaml                             # what the run starts from
megatron-laser train RUN.yaml --dry-run --world-size 64   # layout, batches and memory on 64 GPUs
megatron-laser plan RUN.yaml --gpus 64                    # seconds of a step, and the fastest layout
```
"""
_LOOKED_AT = """## What is looked at before a run

"refuses": a fault ends the command with exit status 2 and a message that names it. "says": it is printed, as a number
or a warning, and the status is 0. "no": not looked at. `train` looks at what `check` does, and at layout and memory on
its real processes, before it builds a model.

| What | `train --dry-run` | `plan` | `check` |
| --- | --- | --- | --- |
| settings: names, types, ranges, and whether they go together | refuses | refuses | refuses |
| the model's shape (`config.json`) | refuses | refuses | refuses |
| weight files: names, shapes and types, from their headers | refuses | refuses | refuses |
| the numbers in weight files | no | no | no |
| whether the longest sequence fits a micro-batch and the model's positions | refuses | refuses | refuses |
| whether `parallel.tensor` and `parallel.pipeline` divide the model | refuses | refuses | refuses |
| whether the number of processes goes into the layout | refuses | refuses | no |
| memory of the fullest GPU | refuses | refuses | no |
| seconds of a step and of its phases | no | says | no |
| whether the score token can be one | refuses | refuses | refuses |
| `tokenizer.json`: that it can be read | refuses | refuses | refuses |
| the tokenizer's size against the model's | no | no | says |
| the chat template | no | no | refuses |
| data files: that they are there, their rows and columns | no | no | refuses |
| lengths of prompts, counted | no | no | says |
| score tokens in the data | no | no | refuses |
| the reward function: imported, its arguments, and a trial | no | no | refuses |
| the rollout function: imported, and its arguments | refuses | no | refuses |
| `run.output_dir`: what would go on, change, or be refused | refuses | no | refuses |
| whether the run may write into its folders | no | no | refuses |
| room on the disks | no | no | says |
| how many steps `run.epochs` are | says | no | says |
| the environment that servers start in | no | no | refuses |
| servers that run already: whether they answer | no | no | no |
| `logging.machine` | no | no | refuses |
| whether this machine has the layers of `model.layers` | no | no | says |

A dry run counts `run.epochs` by the rows of the data, and says the most that they can be; `check` tokenizes. None of
the three builds the model, starts or asks a server, or uses a GPU: see [first_cluster_hour.md](first_cluster_hour.md)
for what to run on GPUs first.
"""


def generate() -> str:
    """The whole page."""
    sections = list(RunConfig.model_fields.items())
    parts = [_INTRODUCTION, _LOOKED_AT]
    parts.append("Sections: " + ", ".join(f"[{name}](#{name})" for name, _ in sections) + ".\n")
    for name, field in sections:
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section), name
        parts.append(f"## {name}\n\n{_prose(section.__doc__)}\n\n{_table(section)}\n")
        for key, entry in _entries(section):
            parts.append(f"### {name}.{key}\n\n{_prose(entry.__doc__)}\n\n{_table(entry)}\n")
    return "\n".join(parts)


def with_alarms(page: str) -> str:
    """The page `ALARMS` with the table of alarms between its two comments."""
    before, begin, rest = page.partition(_ALARMS_BEGIN)
    _, end, after = rest.partition(_ALARMS_END)
    assert begin and end, f"{ALARMS} has lost the comments between which the table of alarms is written"
    return before + begin + alarm_table() + end + after


def alarm_table() -> str:
    """What each alarm looks at, its limit, what it usually means and where to look."""
    section = RunConfig.model_fields["alarms"].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    settings = section()
    lines = ["| alarm, limit | raised when | it usually means | where to look |", "| --- | --- | --- | --- |"]
    for rule in RULES:
        metrics = ", ".join(f"`{name}`" for name in rule.metrics)
        raised = _prose(section.model_fields[rule.name].description)
        cells = (
            f"`{rule.name}` {rule.limit(settings):g}",
            f"**{rule.title[0].upper()}{rule.title[1:]}.** {raised}",
            rule.means,
            f"{metrics}; [{rule.page.partition('#')[0]}]({rule.page}); `{rule.command}`",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _table(section: type[Section]) -> str:
    lines = ["| key | type | default | if changed | meaning |", "| --- | --- | --- | --- | --- |"]
    for key, field, mark in _leaves(section):
        cells = (
            f"`{key}`",
            describe_type(field.annotation, field.metadata),
            _default(field),
            mark.kind,
            _prose(field.description),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _entries(section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """The settings that are lists of tables, with the section that describes one of these."""
    for key, field in section.model_fields.items():
        for part in _parts(field.annotation):
            if part is not field.annotation and isinstance(part, type) and issubclass(part, Section):
                yield key, part


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _leaves(
    section: type[Section], prefix: str = "", default: Changing | None = None
) -> Iterator[tuple[str, FieldInfo, Changing]]:
    default = getattr(section, "changing", default)
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{key}.", default)
        else:
            yield prefix + key, field, mark_of(section, key, default)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    return f"`{_yaml(field.get_default(call_default_factory=True))}`"


def _yaml(value: Any) -> str:
    """A value as one would write it in the YAML file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str):
        return f'"{value}"' if not value or value != value.strip() or value in ("on", "off") else value
    return str(value)


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, its limits included: "integer >= 1", "`a` or `b`", "path or null"."""
    limits = _limits(metadata)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return describe_type(inner, [*more, *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(
            "null" if part is type(None) else describe_type(part, metadata) for part in get_args(annotation)
        )
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "table"
    if origin is tuple:
        parts = get_args(annotation)
        if parts[-1] is Ellipsis and isinstance(parts[0], type) and issubclass(parts[0], Section):
            return "list of tables"
        if parts[-1] is Ellipsis:
            one = describe_type(parts[0])
            return f"{one} or a list of them"
        return f"[{', '.join(describe_type(part) for part in parts)}]"
    return _NAMES[annotation] + (f" {limits}" if limits else "")


def _limits(metadata: Iterable[Any]) -> str:
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    found = [
        f"{sign} {value:{'d' if isinstance(value, int) else 'g'}}"
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        for value in (getattr(item, attribute, None) for item in flat)
        if value is not None
    ]
    return " and ".join(found)


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    pages = {TARGET: generate(), ALARMS: with_alarms(ALARMS.read_text(encoding="utf-8"))}
    for page, text in pages.items():
        current = page.read_text(encoding="utf-8") if page.exists() else ""
        if options.check and current != text:
            print(f"{page} is not up to date: run `{COMMAND}`", file=sys.stderr)
            return 1
        if not options.check:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
