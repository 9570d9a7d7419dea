"""What reward functions are told, by the names of their parameters; verl's and TRL's through their adapters."""

import json
from dataclasses import asdict

import pytest

from megatron_laser.data.readers import Row, read_rows
from megatron_laser.errors import DataError
from megatron_laser.rewards import (
    PLAIN,
    Facts,
    Grade,
    GradingPool,
    RewardRule,
    RewardSpecError,
    may_want_row,
    trial,
)
from megatron_laser.rewards.arguments import ArgumentsError, bind_native
from megatron_laser.rewards.workers.grader import Grader

CODE = '''
from megatron_laser.rewards import Grade

def everything(response, answer, prompt, row, finish_reason, num_tokens):
    assert (response, answer, prompt, finish_reason, num_tokens) == ("r", "a", "p", "length", 7)
    return row["worth"]

def by_keyword(**given):
    return 0.5 if sorted(given) == ["answer", "finish_reason", "num_tokens", "prompt", "response", "row"] else 0.0

def other_names(text, gold, *, num_tokens):
    return float((text, gold) == ("r", "a")) * num_tokens / 10

def plain(response, answer):
    return float(response == answer)

def voting(response):
    return Grade(1.0, "correct", answer="forty two", terms={"length": len(response)})

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """As verl's default_compute_score: by data source, with a dict."""
    assert data_source == "openai/gsm8k" and extra_info["index"] == 3
    right = solution_str.endswith(ground_truth)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[-2:]}

def accuracy_reward(prompts, completions, solution, **kwargs):
    """As in TRL's documentation, for conversations."""
    contents = [completion[0]["content"] for completion in completions]
    assert prompts[0][-1]["content"] == "p" and kwargs["level"] == [None]
    return [None if s == "?" else float(c == s) for c, s in zip(contents, solution, strict=True)]

def format_reward(completions, trainer_state=None, **kwargs):
    return [1.0 if completion.startswith("<think>") else 0.0 for completion in completions]

def asks(response, answer, *, foo):
    return 1.0
'''

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "p"}],
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 3},
}
TRL = {"prompt": [{"role": "user", "content": "p"}], "solution": "42", "level": None}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(CODE)
    return path


def facts(row, prompt="p"):
    return Facts(prompt, json.dumps(row), "length", 7)


def graded(spec, items, row, rule=PLAIN):
    """As a worker grades, in this process."""
    grader = Grader(spec, asdict(rule))
    return [grader.grade(*item, facts(row).message(grader.needs)) for item in items]


def test_a_function_takes_what_its_parameters_name(file):
    with GradingPool(workers=1, deadline=20.0, function=f"{file}:everything") as pool:
        assert pool.needs == {"prompt", "row", "finish_reason", "num_tokens"}
        asked = [("r", "a"), ("r", "a"), ("other", "a")]
        grades = pool.grade_many(asked, facts=[facts({"worth": worth}) for worth in (0.75, 0.25, 1.0)])
        assert grades == [Grade(0.75, "correct"), Grade(0.25, "wrong"), Grade(0.0, "crash")]
        assert pool.grade_many([("r", "a")])[0].failed
        assert "takes `prompt`, which is not known of this response here" in pool.last_trouble


def called(file, name):
    scope = {}
    exec(CODE, scope)
    return bind_native(scope[name])


def test_other_names_in_the_first_two_places_are_response_and_answer(file):
    given = {"row": '{"worth": 1}', "prompt": "p", "finish_reason": "stop", "num_tokens": 5}
    assert called(file, "other_names").call("r", "a", given) == 0.5
    assert called(file, "other_names").needs == {"num_tokens"}
    assert called(file, "by_keyword").call("r", "a", given) == 0.5
    assert called(file, "plain").needs == set() and called(file, "plain").call("a", "a", {}) == 1.0
    assert bind_native(lambda a, b, row=None: (a, b, row)).call("r", "a", given) == ("r", "a", {"worth": 1})
    assert bind_native(lambda *both: both).call("r", "a", {}) == ("r", "a")
    assert bind_native(lambda answer: answer).call("r", "a", {}) == "a"
    with pytest.raises(ArgumentsError, match="takes `row`, which is not known"):
        called(file, "everything").call("r", "a", {"prompt": "p"})


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda question, response, answer: 1.0, "question"),  # the response would be called question
        (lambda reference, response: 1.0, "reference"),
        (lambda text, question, answer: 1.0, "text` and `question"),
        (lambda prompt, completion: 1.0, "completion"),
        (lambda text, row: 1.0, "text"),
    ],
)
def test_names_that_contradict_their_places_are_refused(function, named):
    with pytest.raises(ArgumentsError, match=rf"takes `{named}`, which (is|are) none of response, answer"):
        bind_native(function)


def test_an_unknown_parameter_is_named(file):
    with pytest.raises(
        RewardSpecError, match=r"mine.py:\d+\) takes `foo`, which is none of response, answer, prompt"
    ):
        GradingPool(workers=1, function=f"{file}:asks")
    rule = RewardRule(weights={"x": 1.0}, functions={"x": f"{file}:asks"})
    with pytest.raises(RewardSpecError, match=r"^reward.terms.x.function '.*' .*takes `foo`"):
        GradingPool(workers=1, function=f"{file}:plain", rule=rule)


def test_a_function_of_verl_runs_as_it_is(file):
    spec, items = f"{file}:compute_score", [("it is 42", "a"), ("it is 41", "a")]
    assert graded(spec, items, VERL, RewardRule(threshold=0.0)) == [
        Grade(1.0, "correct", "42", {"reward": 1.0, "acc": 1.0}, 1.0),
        Grade(0.0, "wrong", "41", {"reward": -1.0, "acc": 0.0}, -1.0),
    ]
    by_accuracy = graded(f"verl:{spec}", items, VERL, RewardRule(label="acc"))
    assert [(grade.reward, grade.learned) for grade in by_accuracy] == [(1.0, 1.0), (0.0, -1.0)]
    # without either -1 is no label, and the message says what to set
    with pytest.raises(ValueError, match=r"without reward.threshold .* not -1.0 \(.*mine.py"):
        graded(spec, items, VERL)


def test_a_function_of_trl_runs_as_it_is_and_none_does_not_apply(file):
    rule = RewardRule(weights={"reward": 1.0, "acc": 2.0}, functions={"acc": f"trl:{file}:accuracy_reward"})
    spec = f"{file}:plain"
    grades = graded(spec, [("42", "42"), ("41", "42")], TRL, rule)
    assert [grade.policy_reward for grade in grades] == [3.0, 0.0]
    (grade,) = graded(spec, [("42", "42")], {**TRL, "solution": "?"}, rule)
    assert grade.policy_reward == 1.0 and grade.terms == {"reward": 1.0, "acc": None}
    with pytest.raises(ValueError, match="'reward' is None, not applicable"):
        graded(f"{file}:accuracy_reward", [("42", "42")], {**TRL, "solution": "?"})
    # of a prompt that is a text, completions are texts; a bare function is known by its signature
    grades = graded(f"{file}:format_reward", [("<think>", ""), ("no", "")], {"prompt": "p"})
    assert [grade.reward for grade in grades] == [1.0, 0.0]


def test_a_column_that_a_trl_function_needs_and_the_row_lacks_is_named(file):
    with pytest.raises(
        ArgumentsError, match=r"takes `solution`, and .* no such column \(it has gold, answer\)"
    ):
        graded(f"{file}:accuracy_reward", [("42", "42")], {"prompt": "p", "gold": "42"})


def test_a_trial_uses_the_row_and_shows_every_term(file):
    rule = RewardRule(weights={"reward": 1.0, "voting": 0.5}, functions={"voting": f"{file}:other_names"})
    (found,) = trial(f"{file}:plain", example=Row(0, "p", "42", "", columns='{"worth": 1}'), rule=rule)
    assert found.level == "note"
    assert "gave 0 (reward 0, voting 0, label 0) for the reference in a box, 0 (" in found.text
    (found,) = trial(
        f"{file}:compute_score",
        example=Row(0, "p", "42", "", columns=json.dumps(VERL)),
        rule=RewardRule(threshold=0),
    )
    assert found.level == "note" and "gave -1 (reward -1, acc 0, label 0)" in found.text


def test_rows_are_kept_only_for_functions_that_may_ask_for_them(file, tmp_path):
    wanted = ("everything", "by_keyword", "compute_score", "accuracy_reward", "missing")
    assert all(may_want_row(f"{file}:{name}") for name in wanted)
    assert not any(may_want_row(f"{file}:{name}") for name in ("plain", "voting", "other_names"))
    assert not may_want_row("math_verify") and may_want_row("trl:some.module:plain")
    assert not may_want_row("megatron_laser.rewards.mathematics.grading:grade_math")


def test_a_row_goes_to_the_function_as_the_file_has_it(tmp_path):
    path = tmp_path / "data.jsonl"
    row = VERL | {"problem": "p", "n": 3, "x": 0.5, "text": "\u00e9\ud83d"}
    path.write_text(json.dumps(row) + "\n")
    keys = {"prompt_key": "prompt", "answer_key": "reward_model.ground_truth", "mathematics": False}
    (found,) = read_rows(path, columns=True, **keys)
    assert json.loads(found.columns) == row and found.answer == "42" and found.columns.isascii()
    assert read_rows(path, **keys)[0].columns == ""
    with pytest.raises(DataError, match=r"no key 'reward_model.truth' \(data.answer_key\)"):
        read_rows(path, **keys | {"answer_key": "reward_model.truth"})


def test_verl_s_parquet_is_read_as_it_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL | {"image": b"\x00"}]), path)
    keys = {"prompt_key": "prompt", "answer_key": "reward_model.ground_truth", "mathematics": False}
    (found,) = read_rows(path, columns=True, **keys)
    assert found.problem == "p" and found.answer == "42" and json.loads(found.columns) == VERL
    assert read_rows(path, **keys)[0].columns == ""
