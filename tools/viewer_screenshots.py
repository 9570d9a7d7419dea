"""Makes the pictures of docs/viewer from a made-up run: python tools/viewer_screenshots.py [FOLDER]

Needs what tools/setup_browser.sh installs. Only the layout is real: every number and every text is invented here or in
tests/helpers/synthetic_run.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import browser as browsers  # noqa: E402
from helpers.synthetic_run import write_synthetic_run  # noqa: E402

from megatron_laser.viewer.api import Viewer  # noqa: E402
from megatron_laser.viewer.server import ViewerServer  # noqa: E402

PROBLEM = r"Let $S_n = 1 + 3 + 5 + \dots + (2n - 1)$. For which $n$ is $S_n = 1600$?"
OPENING = (
    "The terms are odd numbers, so I look at small cases first : $S_1 = 1$ , $S_2 = 4$ , $S_3 = 9$ . "
    "It seems that $S_n = n^2$ . To prove it, pair the first with the last term: each pair has the sum $2n$ , "
    "and there are $\\frac{n}{2}$ of them, so\n\n"
    "$$ S_n = \\sum_{k=1}^{n} (2k - 1) = 2\\cdot\\frac{n(n+1)}{2} - n = n^2 . $$\n\n"
)
RIGHT = (
    "Then $n^2 = 1600$ gives $n = 40$ . **Check:** the last term is $2\\cdot 40 - 1 = 79$ "
    "and $\\frac{1+79}{2}\\cdot 40 = 1600$ . "
)
WRONG = "Then $2n - 1 = 1600$ is impossible, since it is even, so I take the nearest one, $n = {answer}$ . "
ANSWERS = ("40", "40", "800", "40", "80", "40", "40", "800")
SCORES = (0.93, 0.88, 0.31, 0.97, 0.12, 0.71, 0.9, 0.64)
SHOTS = {
    "curves": (1280, 760, "light", "#/curves?smooth=0.9"),
    "responses": (1280, 560, "light", "#/responses?run=0&verdict=wrong&sort=-gap&score=0.5.."),
    "tokens": (1280, 560, "dark", "#/response?run=0&id={id}&tab=tokens&token=14"),
    "step": (1280, 560, "light", "#/step?run=0&step=896"),
}
READY = {
    "curves": "document.querySelectorAll('.chart canvas').length >= 4",
    "responses": "document.querySelector('.table .body .row')",
    "tokens": "document.querySelector('.flow [data-token]')",
    "step": "document.querySelector('.timeline rect')",
}
COLOURS = 40


def solution(answer: str, score: float, rng: np.random.Generator) -> dict[str, Any]:
    """A written response with numbers of its tokens, which are its words."""
    text = (
        OPENING
        + (RIGHT if answer == "40" else WRONG.format(answer=answer))
        + rf"So the answer is $\boxed{{{answer}}}$."
    )
    pieces = text.split(" ")
    pieces = [pieces[0], *(" " + piece for piece in pieces[1:]), ""]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    surprise = rng.exponential(0.25, len(pieces)) * rng.choice([0.1, 1, 4], len(pieces), p=[0.5, 0.4, 0.1])
    policy = -surprise + rng.normal(0, 0.015, len(pieces))
    places = [*range(15, len(pieces), 16), len(pieces)]
    path = np.linspace(0.45, score, len(places)) + rng.normal(0, 0.05, len(places))
    return {
        "problem": PROBLEM,
        "answer": "40",
        "response": "".join(pieces),
        "reward": float(answer == "40"),
        "outcome": "correct" if answer == "40" else "wrong",
        "finish_reason": "stop",
        "score": score,
        "scored": True,
        "response_ids_length": len(pieces),
        "token_ends": ends,
        "token_logprobs": np.round(-surprise, 5).tolist(),
        "token_policy_logprobs": np.round(np.minimum(policy, 0), 5).tolist(),
        "token_entropy": np.round(surprise * 0.8 + rng.exponential(0.1, len(pieces)), 5).tolist(),
        "readouts": {
            "score": [[len(pieces), score]],
            "so far": [
                [place, round(float(value), 3)] for place, value in zip(places[:-1], path, strict=False)
            ],
        },
    }


def write_runs(root: Path) -> tuple[list[Path], int]:
    """Two runs, and the id of the response that a picture shows."""
    first = write_synthetic_run(
        root / "laser", steps=1000, responses=10_000, mean_length=60, name="laser", total_steps=1000
    )
    second = write_synthetic_run(
        root / "grpo", steps=700, responses=400, name="laser, lr 3e-6", seed=5, lr=3e-6, total_steps=1000
    )
    dump = first / "rollouts" / "step_900.jsonl"
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    rng = np.random.default_rng(4)
    for place, (answer, score) in enumerate(zip(ANSWERS, SCORES, strict=True)):
        rows[place] |= solution(answer, score, rng)
    dump.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    before = sum(
        len(path.read_text().splitlines()) for path in dump.parent.iterdir() if int(path.stem[5:]) < 900
    )
    return [first, second], before


def main(folder: Path) -> None:
    """Write the pictures, in few colours: they are a third as large, and nothing of a page is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, browsers.browser() as launched:
        runs, number = write_runs(Path(scratch))
        viewer = Viewer(runs)
        viewer.read_responses()
        server = ViewerServer(viewer, port=0)
        server.start()
        for name, (width, height, scheme, address) in SHOTS.items():
            with browsers.Watched(
                launched, width=width, scheme=scheme, origin=server.url.split("?")[0]
            ) as own:
                own.page.set_viewport_size({"width": width, "height": height})
                own.page.goto(server.url + address.format(id=number))
                own.until(READY[name])
                own.page.wait_for_timeout(500)  # charts are painted in the next frame
                image = Image.open(BytesIO(own.page.screenshot())).convert("RGB")
                path = folder / f"{name}.png"
                image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                    path, optimize=True
                )
                print(path, path.stat().st_size, own.faults())
        server.close()
        viewer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs" / "viewer", help="where to")
    target = parser.parse_args().folder
    if reason := browsers.missing():
        sys.exit(reason)
    main(target)
