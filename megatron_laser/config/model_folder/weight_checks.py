"""Whether the weights of a model folder are those that its config.json describes, from the files' headers alone.

The one place that says which folder can be used. The dry run, the start of a run, loading, conversion, scoring and
serving all ask here, so that none of them takes what another refuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_laser.config.model_folder.architecture import Architecture, read_architecture
from megatron_laser.config.model_folder.parameters import EMBEDDING, HEAD, tensor_shapes
from megatron_laser.config.model_folder.safetensors_headers import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    read_stored_tensors,
)
from megatron_laser.errors import ConfigError, Finding, ModelFolderError

HARMLESS = (r"(model\.|model\.layers\.\d+\.self_attn\.)rotary_emb\.inv_freq",)
"""Tensors that older exports hold and that follow from config.json: read by nobody, and no reason to refuse."""

# Types that a cast turns into the run's; everything else is codes that need scales.
_CAST = ("F64", "F32", "F16", "BF16")
_MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
_RUN_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_QUANTIZED_BY = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quant_model_description.json",
)
_SHOWN = 4
_CHUNK = 16 * 2**20  # bytes

_DEQUANTIZE = (
    "use the model's original weights, or write dequantized bfloat16 ones to a new folder and leave "
    "quantization_config out of its config.json"
)
_OTHER_MODEL = "config.json and weights disagree: download the folder again, or correct config.json"


def model_folder_findings(folder: str | Path, *, dtype: str | None = None) -> list[Finding]:
    """What a run would find in `folder`: config.json, files, tensors, shapes, quantization, ties and types.

    Headers are read, no weights; only where a tied model's file holds an `lm_head.weight` too are those two compared.

    Args:
        dtype: `model.dtype`, to say what its cast changes; None: nothing is said.

    Returns:
        One finding for each thing looked at; what depends on a broken one is left out.
    """
    folder = Path(folder)
    try:
        architecture = read_architecture(folder)
    except ConfigError as error:
        text = f"{error.source}: " if error.source else ""
        return [Finding("model", "error", text + "; ".join(error.problems))]
    found = [Finding("model", "ok", _described(architecture)), *_neighbours(folder)]
    try:
        stored = read_stored_tensors(folder)
        problems = weight_problems(folder, stored, architecture)
    except ModelFolderError as error:
        return [*found, Finding("weight files", "error", str(error))]
    files = {tensor.file for tensor in stored.values()}
    mib = sum(tensor.nbytes for tensor in stored.values()) / 2**20
    size = f"{mib:.3g} MiB" if mib < 1000 else f"{mib / 1024:.3g} GiB"
    text = f"{len(stored)} tensors in {_count(len(files), 'file')}, {size}"
    found += [Finding("weight files", "ok", text), *_strangers(folder, files), *problems]
    wrong = {finding.topic for finding in problems}
    if "tied weights" not in wrong:
        found.append(_tied_or_not(architecture))
    if "quantization" not in wrong:
        found.append(_dtypes(stored, dtype))
    return found


def check_model_folder(folder: str | Path) -> None:
    """Refuse `folder` with everything that `model_folder_findings` calls an error, in one line.

    Raises:
        ConfigError: config.json describes no model that can be built.
        ModelFolderError: the weights are missing, broken, quantized, or not those that config.json describes.
    """
    architecture = read_architecture(folder)
    refuse(_neighbours(Path(folder)))
    refuse(weight_problems(Path(folder), read_stored_tensors(folder), architecture))


def refuse(findings: Iterable[Finding]) -> None:
    """Raises ModelFolderError with the errors among `findings`."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise ModelFolderError("; ".join(_line(finding) for finding in errors))


def weight_problems(
    folder: Path, stored: Mapping[str, StoredTensor], architecture: Architecture
) -> list[Finding]:
    """Errors of the tensors `stored` in `folder` as the weights of `architecture`; empty when they are."""
    codes = {
        name: tensor for name, tensor in stored.items() if tensor.dtype not in _CAST and not _harmless(name)
    }
    if codes:
        kinds = Counter(tensor.dtype for tensor in codes.values())
        said = ", ".join(f"{number} of type {kind}" for kind, number in sorted(kinds.items()))
        text = f"{folder} holds quantized weights, which a cast would take for numbers: {said}"
        return [Finding("quantization", "error", text, _examples(codes), _DEQUANTIZE)]
    expected = tensor_shapes(architecture)
    problems = []
    missing = [name for name in expected if name not in stored]
    if missing == [HEAD]:
        text = (
            f"{folder}: {HEAD} is missing, and config.json says tie_word_embeddings false (or nothing, which means "
            "false)"
        )
        cure = "set tie_word_embeddings to true if the model shares it with the embedding, else download it"
        problems.append(Finding("tied weights", "error", text, (), cure))
    elif missing:
        text = f"{folder}: {_count(len(missing), 'tensor')} missing from its safetensors files"
        problems.append(Finding("tensors", "error", text, _first(missing), _OTHER_MODEL))
    unused = [
        name
        for name in stored
        if name not in expected
        and not _harmless(name)
        and not (name == HEAD and architecture.tied_embeddings)
    ]
    if unused:
        kind = f"a {architecture.model_type} model of this config.json"
        text = f"{folder}: {_count(len(unused), 'tensor')} that {kind} has no use for"
        problems.append(Finding("tensors", "error", text, _first(unused), _OTHER_MODEL))
    wrong = {
        name: f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    }
    if wrong:
        text = f"{folder}: {_count(len(wrong), 'tensor')} of another shape than config.json says"
        problems.append(Finding("tensors", "error", text, _first(list(wrong.values())), _OTHER_MODEL))
    both = HEAD in stored and EMBEDDING in stored
    if architecture.tied_embeddings and both and not _same_bytes(stored[HEAD], stored[EMBEDDING]):
        text = f"{folder}: config.json says tie_word_embeddings true, but its files hold another {HEAD}"
        cure = f"set tie_word_embeddings to false to use it, or remove {HEAD} to use the embedding"
        problems.append(Finding("tied weights", "error", text, (), cure))
    return problems


def _neighbours(folder: Path) -> list[Finding]:
    """Other files of the folder that change what somebody makes of the weights."""
    found = [
        Finding(
            "quantization", "error", f"{folder / name} says that the weights are quantized", (), _DEQUANTIZE
        )
        for name in _QUANTIZED_BY
        if (folder / name).is_file()
    ]
    if (adapter := folder / "adapter_config.json").is_file():
        text = f"{adapter}: an adapter lies beside the weights, which only some loaders would add"
        found.append(Finding("adapter", "error", text, (), "merge it into the weights, or remove the file"))
    return found


def _strangers(folder: Path, read: Collection[Path]) -> list[Finding]:
    """Weights that lie beside a `model.safetensors` without an index: SGLang's servers load every file then."""
    others = sorted(file.name for file in folder.glob("*.safetensors") if file not in read)
    if not others or (folder / INDEX).is_file():
        return []
    text = (
        f"{_count(len(others), 'safetensors file')} beside {WEIGHTS}, which SGLang's servers would load, too"
    )
    return [
        Finding("weight files", "warning", text, _first(others), "remove what does not belong to the model")
    ]


def _tied_or_not(architecture: Architecture) -> Finding:
    if architecture.tied_embeddings:
        return Finding("tied weights", "ok", "the output layer is the embedding (tie_word_embeddings true)")
    return Finding("tied weights", "ok", f"the output layer is {HEAD} (tie_word_embeddings false)")


def _dtypes(stored: Mapping[str, StoredTensor], dtype: str | None) -> Finding:
    kinds = Counter(tensor.dtype for name, tensor in stored.items() if not _harmless(name))
    said = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    rounds = dtype is not None and any(_MANTISSA[kind] > _MANTISSA[_RUN_DTYPES[dtype]] for kind in kinds)
    if rounds:
        text = f"{said}: rounded to model.dtype {dtype} when they are loaded"
        return Finding("weight types", "note", text)
    return Finding("weight types", "ok", said)


def _described(arch: Architecture) -> str:
    return (
        f"{arch.model_type}, {arch.num_layers} layers of {arch.hidden_size}, vocabulary {arch.vocab_size}, "
        f"reads {arch.max_position_embeddings} tokens"
    )


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            left = one.nbytes
            while left:
                part = first.read(min(left, _CHUNK))
                if not part or part != second.read(len(part)):
                    return False
                left -= len(part)
    except OSError as error:
        raise ModelFolderError(
            f"{error.filename or one.file} cannot be read: {error.strerror or error}"
        ) from error
    return True


def _harmless(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in HARMLESS)


def _examples(tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    return tuple(
        f"{name} ({tensor.dtype}) in {tensor.file.name}" for name, tensor in list(tensors.items())[:_SHOWN]
    )


def _first(items: Sequence[str]) -> tuple[str, ...]:
    return (*items[:_SHOWN], *(["..."] if len(items) > _SHOWN else []))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _line(finding: Finding) -> str:
    examples = f" ({', '.join(finding.examples)})" if finding.examples else ""
    return f"{finding.text}{examples}: {finding.cure}" if finding.cure else f"{finding.text}{examples}"
