"""Tokens of a model folder that no text needs: candidates for the score token. From its JSON files, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.config.model_folder.special_tokens import read_vocabulary

# Reserved for nobody (Llama 3, Gemma, Phi, and names that people give), or for pictures, which a text model never sees
# (Qwen: the paper's own choice).
_RESERVED = re.compile(r"reserved|unused|extra_id|spare|score|dummy|placeholder", re.IGNORECASE)
_OTHER_MEDIA = re.compile(
    r"vision|image|video|audio|object_ref|box_|quad_|fim_|repo_|file_sep|img", re.IGNORECASE
)
# What structures chats and texts, or stands for text: never spare, whatever the files say.
_STRUCTURE = re.compile(
    r"im_start|im_end|endoftext|eot|eom|eos|bos|begin_of|end_of|start_header|end_header|pad|unk|mask|cls|sep|"
    r"<s>|</s>|user|assistant|system|tool|think|python_tag|finetune|channel|message|^\|?end\|?$",
    re.IGNORECASE,
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class SpareToken:
    """A candidate. `text` is None for a row of the output layer that no token has; `kind` is reserved, media,
    special or row, the order in which they are proposed."""

    id: int
    text: str | None
    kind: str

    @property
    def name(self) -> str:
        """As the configuration has it: the text, or the id of a row without one."""
        return str(self.id) if self.text is None else self.text


def spare_tokens(
    folder: str | Path, *, vocab_size: int, stop_token_ids: Collection[int], with_rows: bool = True
) -> list[SpareToken]:
    """Special tokens that neither end nor structure a text, and rows of the embedding without a token.

    Args:
        vocab_size: rows of the model's embedding; tokens beyond them are left out.
        with_rows: also propose rows without a token (models pad the vocabulary), the lowest ids of them.

    Raises:
        ConfigError: a file is no valid JSON.
    """
    folder = Path(folder)
    vocabulary = read_vocabulary(folder)
    template = _template(folder)
    settings_tokens = _named_in_settings(folder)
    found: list[SpareToken] = []
    for text in vocabulary.special:
        token_id = vocabulary.ids[text]
        bare = text.strip("<>[]|")
        if token_id in stop_token_ids or not 0 <= token_id < vocab_size or text in settings_tokens:
            continue
        if text in template or _STRUCTURE.search(text) or _STRUCTURE.search(bare):
            continue
        kind = "reserved" if _RESERVED.search(bare) else "media" if _OTHER_MEDIA.search(bare) else "special"
        found.append(SpareToken(token_id, text, kind))
    order = ("reserved", "media", "special")
    found.sort(key=lambda token: (order.index(token.kind), token.id))
    if with_rows and vocabulary.ids:
        named = set(vocabulary.ids.values())
        found += [SpareToken(row, None, "row") for row in range(vocab_size) if row not in named]
    return found


def how_to_add_a_token(folder: str | Path) -> str:
    """What to run where a tokenizer has no spare token."""
    return f"""\
Add one, to tokenizer and model, and calibrate the new folder:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, target = {str(folder)!r}, "model-with-score-token"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer.add_special_tokens({{"additional_special_tokens": ["<|score|>"]}})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
"""


def _template(folder: Path) -> str:
    """The chat template's text, in which a structural token's name stands."""
    texts = []
    for name in _TEMPLATE_FILES:
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if name.endswith(".json"):
            content = _loads(text)
            text = str(content.get("chat_template") or "") if isinstance(content, dict) else ""
        texts.append(text)
    return "\n".join(texts)


def _named_in_settings(folder: Path) -> set[str]:
    """Tokens with a role of their own: bos_token, pad_token and so on."""
    roles: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        content = _loads(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
        for key, value in (content or {}).items():
            if key.endswith("_token"):
                roles.add(value.get("content", "") if isinstance(value, dict) else str(value))
    return roles


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None  # `read_vocabulary` says so, for the files that matter
