"""tools/predict_kernels.py: the model repeats a table that was made by hand, and says which targets it predicts."""

import json
import subprocess
import sys

import pytest
from helpers.source_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from kernel_model.devices import DEVICES, FEW_ROW_SHAPES, SHAPES
from kernel_model.few_rows import few_rows
from kernel_model.training import predictions

# An earlier calculation with the same constants, of what the op did then: slices of equal width from 512 MiB, and all
# logits made again in the backward. (device, hidden size, columns): forward ms, backward ms, backward with main_grad.
# It left out dX's conversion to bf16.
BEFORE = {
    ("H200", 5120, 152064): (36.17, 106.24, 106.96),
    ("H200", 5120, 19008): (4.68, 13.75, 13.84),
    ("H200", 3584, 152064): (26.33, 75.74, 76.24),
    ("H200", 3584, 19008): (3.43, 10.11, 10.18),
    ("H100", 5120, 152064): (36.95, 107.55, 108.58),
    ("H100", 5120, 19008): (4.77, 13.94, 14.07),
    ("H100", 3584, 152064): (27.21, 77.15, 77.88),
    ("H100", 3584, 19008): (3.54, 10.30, 10.39),
}
FOUND = {
    (device.name, shape.hidden, shape.columns): {one.variant: one for one in predictions(device, shape)}
    for device in DEVICES
    for shape in SHAPES
}


def milliseconds(terms):
    return sum(value for name, value in terms.items() if name != "dX in bf16") * 1e3


@pytest.mark.parametrize("case", BEFORE)
def test_the_model_repeats_the_earlier_table(case):
    plain = FOUND[case]["recomputed, 512 MiB, even slices"]
    main_grad = FOUND[case]["recomputed, 512 MiB, even slices, main_grad"]
    found = (
        milliseconds(plain.forward),
        milliseconds(plain.backward),
        milliseconds(main_grad.backward),
    )
    assert found == pytest.approx(BEFORE[case], abs=0.011)


@pytest.mark.parametrize(("device", "limit"), [("H200", 1.12), ("H100", 1.14)])
def test_kept_meets_its_target_and_recomputing_does_not(device, limit):
    found = FOUND[device, 5120, 152064]
    for variant in ("kept", "kept, main_grad"):
        assert found[variant].ratio <= limit and found[variant].target == f"met (<= {limit})"
    assert found["recomputed"].ratio > limit and found["recomputed"].target.startswith("missed")
    assert FOUND[device, 3584, 152064]["kept"].target == ""


def test_every_variant_is_above_the_floor_and_terms_add_up():
    for variants in FOUND.values():
        for one in variants.values():
            skipped = "without gradient" in one.variant
            assert one.ratio > (2 / 3 if skipped else 1.0)
            row = one.row()
            terms = [*row["forward_terms_ms"].values(), *row["backward_terms_ms"].values()]
            assert sum(terms) == pytest.approx(row["sum_ms"], abs=0.02) and min(terms) >= 0


def test_few_rows_at_tp_8_are_bound_by_the_host_until_one_kernel_finishes_them():
    (h200,) = [device for device in DEVICES if device.name == "H200"]
    sharded = next(shape for shape in FEW_ROW_SHAPES if shape.rows == 128 and shape.shards == 8)
    before, now = few_rows(h200, sharded)
    assert before.kernel * 1e3 == pytest.approx(0.062, abs=1e-3) and before.call == before.host
    assert now.kernel * 1e3 == pytest.approx(0.051, abs=1e-3) and now.call < before.call


def test_the_command_prints_a_line_for_each_prediction_as_json_and_tables():
    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools/predict_kernels.py"), "--device", "H200", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    rows = [json.loads(line) for line in run("--json").splitlines()]
    assert len(rows) == sum(len(FOUND["H200", shape.hidden, shape.columns]) for shape in SHAPES) + 8
    assert {row["device"] for row in rows} == {"H200"}
    page = run("--markdown")
    assert "| H200 | 16384 x 5120 x 152064 | kept |" in page and "met (<= 1.12)" in page
    assert "z 32.94" in run("--terms")
