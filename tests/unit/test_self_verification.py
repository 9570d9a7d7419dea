"""Prompted verification: the prompt, reading verdicts, the summary; and asked of an engine, also after a kill."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_laser.evaluation.weight_identity import WeightsChanged
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.testtime import EngineChoice, TestTimeError
from megatron_laser.testtime.self_verification import (
    VerdictSettings,
    read_questions,
    verdict_summary,
    verify_file,
)
from megatron_laser.testtime.verdicts import VerdictForm, read_template, share_right
from megatron_laser.types import Generation

SAYS = {1: "It adds up: \\boxed{Yes}", 2: "so \\boxed{No}.", 3: "who knows", 4: "yes"}


def test_problem_and_response_are_filled_in_once_and_stay_what_they_are():
    form = VerdictForm("{problem} | {response} | {x} {problem}")
    assert (
        form.prompt("a {response}", "\\frac{1}{2} \\1")
        == "a {response} | \\frac{1}{2} \\1 | {x} a {response}"
    )
    assert VerdictForm().prompt("P?", "R!").count("P?") == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("thinking \\boxed{Yes}", True),
        ("\\boxed{ no }", False),
        ("\\boxed{\\text{Incorrect}}", False),
        ("\\boxed{correct}", True),
        ("at first \\boxed{Yes}, but then \\boxed{No}", False),
        ("\\boxed{nothing}", None),
        ("\\boxed{42}", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_the_last_verdict_in_a_box_counts_and_nothing_else_is_one(text, verdict):
    assert VerdictForm().read(text) is verdict


def test_another_prompt_brings_its_own_patterns(tmp_path):
    (tmp_path / "prompt.txt").write_text("Judge {problem} {response}: [[1]] or [[0]]\n")
    form = VerdictForm(read_template(tmp_path / "prompt.txt"), r"\[\[1\]\]", r"\[\[0\]\]")
    assert (form.read("[[1]]"), form.read("[[1]] no [[0]]"), form.read("\\boxed{Yes}")) == (True, False, None)
    for template, pattern, message in (
        ("only {problem}", "x", r"the template has no \{response\}"),
        ("{problem}{response}", "(", "--right-pattern '\\(' is no regular expression"),
    ):
        with pytest.raises(TestTimeError, match=message):
            VerdictForm(template, pattern)
    with pytest.raises(TestTimeError, match=r"--template .*missing"):
        read_template(tmp_path / "missing")


def test_the_score_is_the_share_of_right_among_verdicts_that_say_something():
    assert share_right([True, None, False, True]) == pytest.approx(2 / 3)
    assert share_right([None, None]) is None


def test_the_summary_counts_what_cannot_be_read_and_keeps_both_f1_apart():
    told = [(1.0, True), (1.0, False), (1.0, None), (0.0, False), (0.0, None), (0.0, True), (0.0, False)]
    rows = [
        {"reward": reward, "verdicts": [v], "score": None if v is None else float(v)} for reward, v in told
    ]
    found = verdict_summary(rows)
    assert (found["verdicts"], found["unparsable"], found["without_verdict"]) == (7, 2, 2)
    assert (found["accuracy_correct"], found["accuracy_incorrect"]) == (1 / 2, 2 / 3)
    assert found["f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert found["strict_f1"] == pytest.approx(2 * (1 / 3) * (3 / 4) / (1 / 3 + 3 / 4))
    unlabelled = verdict_summary([{"verdicts": [True], "score": 1.0}])
    assert unlabelled["labelled"] == 0 and math.isnan(unlabelled["f1"])


class Judge:
    """Says `SAYS` of the last token of the response that it is shown; may be killed after some verdicts."""

    def __init__(self, *, dies_after=None, trains=False):
        self.dies_after, self.trains, self.asked = dies_after, trains, []

    error = KeyboardInterrupt

    def named_parameters(self):
        """The weights by which verdicts are known again; `trains` changes them after the first call."""
        return {"weight": torch.tensor([float(self.trains and len(self.asked) > 0)])}

    def generate(self, prompts, sampling, *, deadline, on_finished=None, stop=None):
        results = []
        for number, prompt in enumerate(prompts):
            self.asked.append(list(prompt))
            group = [
                Generation([prompt[-1], 0], [-1.0, -1.0], "stop", 0)
                for _ in range(sampling.samples_per_prompt)
            ]
            for sample, generation in enumerate(group):
                if self.dies_after is not None and len(self.asked) > self.dies_after:
                    raise self.error
                on_finished(number, sample, generation)
            results.append(group)
        return results


def folder(max_positions=100):
    tokenizer = SimpleNamespace(
        chat_template=None,
        bos_token_id=None,
        bos_token=None,
        encode=lambda text: [int(c) for c in text if c.isdigit()],
    )
    return SimpleNamespace(
        tokenizer=tokenizer,
        path="model",
        max_positions=max_positions,
        stop_token_ids=(0,),
        decode=lambda ids: SAYS[ids[0]],
    )


@pytest.fixture
def ids_of_digits(monkeypatch):
    monkeypatch.setattr(
        "megatron_laser.testtime.self_verification.prompt_token_ids",
        lambda row, tokenizer, apply_chat_template, options: tokenizer.encode(row["prompt"]),
    )


SETTINGS = VerdictSettings(VerdictForm("{problem} {response}"), max_new_tokens=8, apply_chat_template=False)
ROWS = [{"problem": "7", "response": str(n), "reward": float(n == 1)} for n in (1, 2, 3, 4, 1, 2)]


def test_verdicts_stand_beside_the_rows(ids_of_digits, tmp_path):
    target = tmp_path / "out.jsonl"
    engine = Judge()
    found = verify_file(folder(), ROWS, target, EngineChoice(), SETTINGS, deadline=60, engine=engine)
    assert engine.asked == [[7, 1], [7, 2], [7, 3], [7, 4], [7, 1], [7, 2]]
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["verdicts"] for row in rows] == [[True], [False], [None], [None], [True], [False]]
    assert [row["score"] for row in rows] == [1.0, 0.0, None, None, 1.0, 0.0]
    assert rows[0]["verdict_texts"] == [SAYS[1]] and rows[0]["problem"] == "7"
    assert (found["unparsable"], found["f1"]) == (2, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_after_a_kill_only_what_is_missing_is_asked_for_and_other_settings_begin_anew(
    ids_of_digits, tmp_path
):
    target, choice = tmp_path / "out.jsonl", EngineChoice(max_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        verify_file(folder(), ROWS, target, choice, SETTINGS, deadline=60, engine=Judge(dies_after=4))
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    other = Judge()
    settings = VerdictSettings(SETTINGS.form, max_new_tokens=9, apply_chat_template=False)
    verify_file(folder(), ROWS, tmp_path / "other.jsonl", choice, settings, deadline=60, engine=other)
    assert len(other.asked) == 6
    again = Judge()
    verify_file(folder(), ROWS, target, choice, SETTINGS, deadline=60, engine=again)
    assert again.asked == [[7, 1], [7, 2]]
    assert target.read_text() == (tmp_path / "other.jsonl").read_text()


def test_verdicts_of_weights_that_changed_meanwhile_are_set_aside(ids_of_digits, tmp_path):
    target = tmp_path / "out.jsonl"
    for error, judge in ((None, Judge(trains=True)), (TimeoutError, Judge(trains=True, dies_after=4))):
        judge.error = error or KeyboardInterrupt
        with pytest.raises(WeightsChanged, match=r"Verdicts of two models may be in .*\.mixed"):
            verify_file(folder(), ROWS, target, EngineChoice(), SETTINGS, deadline=60, engine=judge)
        (left,) = tmp_path.iterdir()
        assert left.suffix == ".mixed"
        left.unlink()


def test_prompts_that_do_not_fit_are_counted_before_anything_is_loaded(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessEngine, "__init__", lambda *_, **__: pytest.fail("loaded"))
        patch.setattr("megatron_laser.testtime.self_verification.prompt_token_ids", lambda *_, **__: [1] * 12)
        with pytest.raises(
            TestTimeError, match=r"6 of 6 prompts .* 12 tokens.*expected --max-new-tokens 7 or less"
        ):
            verify_file(folder(20), ROWS, tmp_path / "x.jsonl", EngineChoice(), SETTINGS, deadline=60)


def test_rows_without_problem_or_response_are_named(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "1", "response": "2", "forced_score": 1}\n{"problem": "1"}\n')
    with pytest.raises(TestTimeError, match=r"in\.jsonl:2: expected `problem`"):
        read_questions(path)
    path.write_text('{"prompt": "1", "response": "2", "forced_score": 1}\n')
    assert read_questions(path) == [{"prompt": "1", "response": "2"}]
