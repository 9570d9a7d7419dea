"""The three examples of examples/rewards train 20 steps each, and keep what they promise of failing answers."""

import json
import threading
import time
from pathlib import Path

import pytest
from helpers import tiny_run
from helpers.plain_http import HttpServer, respond
from helpers.source_tree import ROOT
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import run

from megatron_laser.rewards import Grade
from megatron_laser.user_functions import import_file

EXAMPLES = ROOT / "examples" / "rewards"
# Tokens that are a whole program each: a model of random weights writes some.
PROGRAMS = ["```python\nx = 1\n```", "```python\nx = 2\n```"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run of 20 steps whose rows have tests."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "TOKENS", [*tiny_run.TOKENS, *PROGRAMS])
        write_tiny_run(
            folder,
            rollout={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
            checkpoint={"every": 20, "export_hf": False},
            run={"steps": 20, "output_dir": "out", "deadline": 60},
        )
    rows = [json.loads(line) | {"tests": "assert x == 1"} for line in (folder / "train.jsonl").open()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(folder, name, *overrides):
    out = run(folder / "run.yaml", folder / name, *overrides)
    lines = metrics_without_times(out)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(line["grading_failed"] == 0 for line in lines)
    return lines


def test_exact_match_trains_with_a_term_for_length(folder):
    place = f"{EXAMPLES}/exact_match.py"
    terms = f"{{reward: 1.0, brief: {{function: {place}:brief, weight: 0.1}}}}"
    lines = trained(folder, "exact", f"reward.function={place}:exact_match", f"reward.terms={terms}")
    for line in lines:
        brief = line["reward/brief"]
        assert line["reward_mean"] == pytest.approx(line["reward/reward"] + 0.1 * brief, abs=1e-12)
    assert any(line["reward/brief"] > 0 for line in lines)  # some ended by themselves
    # what only differs in length has advantages
    assert any(line["grad_norm"] > 0 and line["groups_uniform_fraction"] == 0 for line in lines)


def test_code_execution_trains_on_the_tests_of_the_rows(folder):
    lines = trained(folder, "code", f"reward.function={EXAMPLES}/code_execution.py:passes_tests")
    counts = {
        name: sum(line[f"outcome/{name}"] for line in lines) for name in ("correct", "wrong", "no_answer")
    }
    assert all(counts.values()) and sum(counts.values()) == 20 * 4
    assert [line["reward_mean"] for line in lines] == [line["outcome/correct"] / 4 for line in lines]


def test_a_model_behind_http_trains_by_its_verdicts(folder, monkeypatch):
    asked = []

    def handle(handler, path, body):
        asked.append((path, handler.headers.get("Authorization"), body["messages"][0]["content"]))
        verdict = 7 if "1" in body["messages"][0]["content"].rpartition("Answer:")[2] else 2
        respond(handler, 200, {"choices": [{"message": {"content": f"Fine.\nVerdict: {verdict}"}}]})

    server = HttpServer(handle)
    server.start()
    monkeypatch.setenv("VERIFIER_URL", f"{server.url}/v1")
    monkeypatch.setenv("VERIFIER_KEY", "secret")
    try:
        lines = trained(
            folder,
            "http",
            f"reward.function={EXAMPLES}/verifier_http.py:judged",
            "reward.terms={reward: 1.0}",
            "reward.threshold=0.5",
        )
    finally:
        server.stop()
    assert {path for path, *_ in asked} == {"/v1/chat/completions"} and asked[0][1] == "Bearer secret"
    assert "1 + 0 ?" in "".join(text for *_, text in asked)  # the problem
    for line in lines:
        right = line["outcome/correct"]
        assert right + line["outcome/wrong"] + line["outcome/no_answer"] == 4
        if not line["outcome/no_answer"]:
            assert line["reward_mean"] == pytest.approx((0.7 * right + 0.2 * (4 - right)) / 4)
        assert line["accuracy_tried"] == right / 4


def example(name):
    return import_file(EXAMPLES / f"{name}.py")


def test_exact_match_votes_with_its_last_line():
    judge = example("exact_match").exact_match
    assert judge("so\n Forty  Two \n\n", "forty two") == Grade(1.0, "correct", answer="forty two")
    assert judge("41", "42") == Grade(0.0, "wrong", answer="41")
    assert judge("\n ", "42") == Grade(0.0, "no_answer")


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("x = 1", True),
        ("x = 2", False),
        ("import sys; sys.exit(0)", False),  # before the tests
        ("x = bytearray(1 << 31)", False),
        ("open('big', 'wb').write(bytes(1 << 21)); x = 1", False),
        (
            "x = 1\nimport os\nassert 'SECRET_OF_THE_RUN' not in os.environ and not os.listdir('..') is None",
            True,
        ),
    ],
)
def test_a_program_passes_only_by_its_tests(program, passes, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_RUN", "1")
    assert example("code_execution").run(program, "assert x == 1") is passes


def test_a_program_that_hangs_is_killed_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    start = "str(subprocess.Popen(['sleep', '60']).pid)"
    program = f"import subprocess\nopen({str(pid)!r}, 'w').write({start})\nwhile True: pass"
    started = time.monotonic()
    assert not example("code_execution").run(program, "", seconds=0.5)
    assert time.monotonic() - started < 5
    stat = Path(f"/proc/{pid.read_text()}/stat")

    def gone():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # It has the signal by now, and dies when it is next given a core: far before its sixty seconds.
    while not gone():
        assert time.monotonic() - started < 20
        time.sleep(0.01)


def test_where_namespaces_are_a_program_has_no_network():
    sandbox = example("code_execution")
    if not sandbox.NETWORK_OFF:
        pytest.skip("this machine lets no process leave the network")
    assert sandbox.run("import socket", "assert [name for _, name in socket.if_nameindex()] == ['lo']")


@pytest.fixture
def judge(monkeypatch):
    """(the example, what the server answers next, the statuses and bodies): in this process."""
    answers = []

    def handle(handler, path, body):
        answer = answers.pop(0)
        if answer == "late":
            threading.Event().wait(0.6)
            answer = {}
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        respond(handler, status, body)

    server = HttpServer(handle)
    server.start()
    module = example("verifier_http")
    monkeypatch.setattr(module, "URL", server.url)
    monkeypatch.setattr(module, "SECONDS", 0.4)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    yield module.judged, answers
    server.stop()


def said(text):
    return {"choices": [{"message": {"content": text}}]}


def test_a_verifier_that_is_busy_is_asked_again_a_bounded_number_of_times(judge):
    judged, answers = judge
    answers[:] = [(503, "busy"), (429, "busy"), said("verdict: 10")]
    assert judged("42", "42", "6 * 7") == Grade(1.0, "correct") and not answers
    answers[:] = [(503, "busy")] * 4
    with pytest.raises(OSError, match="status 503: busy"):
        judged("42", "42", "6 * 7")
    assert len(answers) == 1
    answers[:] = [(401, "who are you")]
    with pytest.raises(OSError, match="status 401: who are you"):
        judged("42", "42", "6 * 7")


def test_a_verifier_without_a_verdict_gives_no_label(judge):
    judged, answers = judge
    answers[:] = [said("I like it")]
    with pytest.raises(ValueError, match="no verdict from 0 to 10 in 'I like it'"):
        judged("42", "42", "6 * 7")
    answers[:] = [said("Verdict: 11")]
    with pytest.raises(ValueError, match="no verdict"):
        judged("42", "42", "6 * 7")
    answers[:] = [{"error": "?"}]
    with pytest.raises(ValueError, match="not a chat completion"):
        judged("42", "42", "6 * 7")


def test_a_verifier_that_is_late_is_a_timeout(judge):
    judged, answers = judge
    answers[:] = ["late"]
    assert judged("42", "42", "6 * 7") == Grade(0.0, "timeout")
    assert judged("  ", "42", "6 * 7") == Grade(0.0, "no_answer")
