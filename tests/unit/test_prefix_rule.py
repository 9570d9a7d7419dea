"""Where prefixes of responses are scored, and by which readout: the run's, or what the command line asks for."""

import shutil

import numpy as np
import pytest
import yaml
from helpers.tiny_run import TOKENS, write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.prefix_rule import AskedPrefixes, PrefixRule
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.testtime import load_model_folder

SCORE, PLUS, UNK = TOKENS.index("<|score|>"), TOKENS.index("+"), TOKENS.index("<unk>")
PREFIX = {"name": "prefix", "position": {"every": 3}, "target": "prefix_value", "weight": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_run(folder)
    return folder


@pytest.fixture
def trained(model, tmp_path):
    """(readouts) -> the output folder of a run that had them."""

    def make(*readouts, **laser):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder / "hf", ignore=shutil.ignore_patterns("*.yaml", "*.jsonl"))
        settings = yaml.safe_load((model / "run.yaml").read_text())
        settings["model"]["path"] = str(model)
        settings["data"]["train"] = str(model / "train.jsonl")
        settings["reward"]["function"] = str(model / "lucky.py") + ":lucky"
        settings["laser"] |= {"readouts": [{}, *readouts], **laser}
        settings["run"]["output_dir"] = str(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return make


def rule_of(folder, *, every=None, delimiter=None, **options):
    return load_model_folder(folder, prefixes=AskedPrefixes(every, delimiter), **options).prefix


def test_places_are_behind_every_so_many_tokens_but_not_behind_the_last():
    rule = PrefixRule(ScoreRule((SCORE,), -5.0, 0.5), every=5)
    assert [rule.places([7] * length) for length in (4, 5, 6, 10, 11)] == [[], [], [5], [5], [5, 10]]
    assert [rule.stretch(tokens, 9)[0] for tokens in (0, 3, 5)] == [5, 2, 5]
    assert rule.stretch(0, 2) == (2, ())
    assert [rule.is_place([7] * length) for length in (4, 5, 10)] == [False, True, True]


def test_the_runs_readout_of_prefixes_is_used_with_its_own_constants(trained):
    rule = rule_of(trained(PREFIX | {"beta": 0.75}))
    assert (rule.every, rule.name, rule.finder) == (3, "prefix", None)
    assert rule.rule == ScoreRule((SCORE,), -5.0, 0.75)
    # as in the run's settings, what is given stands for readouts that have nothing of their own
    given = rule_of(trained(PREFIX | {"beta": 0.75}), ref_logprob=-4.0, beta=0.1)
    assert given.rule == ScoreRule((SCORE,), -4.0, 0.75)


def test_a_pair_of_tokens_at_a_delimiter(trained):
    readout = {
        "position": {"delimiter": "+"},
        "tokens": ["<|score|>", "<unk>"],
        "score": "pair_sigmoid",
        "loss": "bce",
        "advantages": "none",
    }
    rule = rule_of(trained(readout))
    assert (rule.every, rule.delimiter, rule.name) == (0, "+", "readout_2")
    assert rule.rule.token_ids == (SCORE, UNK) and rule.rule.kind == "pair_sigmoid"
    assert rule.places([7, PLUS, 7, PLUS, PLUS]) == [2, 4]
    assert rule.stretch(2, 9) == (9, (PLUS,))
    assert [rule.is_place(ids) for ids in ([7, PLUS], [PLUS, 7])] == [True, False]
    assert rule.finder.completes(np.array([], dtype=np.int64)) is False


def test_the_command_line_moves_the_places_and_keeps_the_readout(trained):
    folder = trained(PREFIX)
    assert rule_of(folder, every=4).every == 4 and rule_of(folder, every=4).name == "prefix"
    assert rule_of(folder, delimiter="+").places([PLUS, 7]) == [1]
    assert rule_of(folder, every=0) is None
    assert rule_of(folder, with_score=False) is None
    assert load_model_folder(folder).prefix is None  # other commands do not score prefixes


def test_without_a_readout_of_prefixes_the_ends_score_is_read_where_it_is_asked_for(model, trained):
    assert rule_of(trained()) is None
    rule = rule_of(trained(), every=4)
    assert (rule.every, rule.name, rule.rule) == (4, "", ScoreRule((SCORE,), -5.0, 0.5))
    plain = rule_of(model, every=4, score_token="<|score|>", ref_logprob=-3.5)
    assert plain.rule == ScoreRule((SCORE,), -3.5, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 4}, "give --score-token"),
        ({"every": 4, "score_token": "<|score|>"}, "give --ref-logprob"),
        (
            {"delimiter": "no such text", "score_token": "<|score|>", "ref_logprob": -3.5},
            "can be in no response",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(model, options, message):
    with pytest.raises(TestTimeError, match=message):
        rule_of(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix-every", "-1"], "expected tokens, or 0"),
        (["--prefix-every", "3", "--prefix-delimiter", "+"], "give one of them"),
        (["--prefix-delimiter", ""], "--prefix-delimiter is empty"),
        (["--stop-below", "0.2"], "say where with --prefix-every"),
        (["--stop-below", "much"], "expected numbers such as 0.2"),
        (["--end-early"], "give the score below which responses end"),
        (["--no-score", "--prefix-every", "3"], "asks for no scores, of prefixes neither"),
        (["--no-score", "--stop-below", "0.2"], "asks for no scores, of prefixes neither"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2(model, options, message):
    score = ["--score-token", "<|score|>", "--ref-logprob", "-3.5"]
    result = CliRunner().invoke(app, ["eval", str(model), str(model / "train.jsonl"), *score, *options])
    assert result.exit_code == 2, result.output
    assert message.replace(" ", "") in result.output.replace("\n", "").replace("│", "").replace(" ", "")
