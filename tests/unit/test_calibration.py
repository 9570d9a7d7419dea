"""Score tokens for a new model: which are proposed, what is measured, and what is refused."""

import json
import math
import re
import shutil
import textwrap

import numpy as np
import pytest
import yaml
from helpers.models import save_word_tokenizer
from helpers.tiny_run import write_tiny_run

from megatron_laser.config.model_folder.spare_tokens import SpareToken, how_to_add_a_token, spare_tokens
from megatron_laser.evaluation.weight_identity import WeightsChanged
from megatron_laser.testtime import EngineChoice, TestTimeError, load_model_folder
from megatron_laser.testtime.calibration import CalibrationSettings, calibrate_model
from megatron_laser.testtime.calibration_result import Calibration, TokenStatistics
from megatron_laser.types import Generation

SETTINGS = CalibrationSettings(
    problems=24,
    samples=8,
    max_new_tokens=40,
    prompt_suffix="",
    apply_chat_template=False,
    max_std=5.0,
    deadline=60.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose states share one large component, by which it all but never gives the score token."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("calibration")
    write_tiny_run(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[2, 0] = -3.0
    model.save_pretrained(folder)
    return folder


def vocabulary(folder, special, *, plain=("a", "b"), **settings):
    """A folder that only has tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*plain, *special]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "added_tokens": [
                    {"content": text, "id": i, "special": True}
                    for i, text in enumerate(tokens)
                    if text in special
                ],
                "model": {"vocab": {text: i for i, text in enumerate(tokens)}},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, len(tokens)


def test_reserved_tokens_come_before_those_of_other_media_and_rows_without_a_token_come_last(tmp_path):
    folder, count = vocabulary(
        tmp_path,
        ["<|vision_start|>", "<|reserved_special_token_3|>", "<|im_start|>", "<|endoftext|>", "<|odd|>"],
    )
    found = spare_tokens(folder, vocab_size=count + 2, stop_token_ids=(5,))
    assert [(token.name, token.kind) for token in found] == [
        ("<|reserved_special_token_3|>", "reserved"),
        ("<|vision_start|>", "media"),
        ("<|odd|>", "special"),
        (str(count), "row"),
        (str(count + 1), "row"),
    ]


def test_tokens_that_end_or_structure_texts_or_have_a_role_are_never_spare(tmp_path):
    special = [
        "<|eot_id|>",
        "<|start_header_id|>",
        "<s>",
        "<pad>",
        "<unk>",
        "<|think|>",
        "<|role|>",
        "<|mine|>",
        "<|stop|>",
    ]
    folder, count = vocabulary(tmp_path, special, bos_token="<|mine|>", chat_template="{{ '<|role|>' }}")
    stop = count - 1
    assert [token.text for token in spare_tokens(folder, vocab_size=count, stop_token_ids=(stop,))] == []


def test_tokens_beyond_the_models_rows_are_left_out(tmp_path):
    folder, count = vocabulary(tmp_path, ["<|reserved_0|>", "<|reserved_1|>"])
    assert [t.text for t in spare_tokens(folder, vocab_size=count - 1, stop_token_ids=())] == [
        "<|reserved_0|>"
    ]


def test_a_tiny_model_gets_its_unused_token_and_its_constants(folder, tmp_path):
    said = []
    model = load_model_folder(folder, with_score=False)
    result = calibrate_model(model, folder / "train.jsonl", EngineChoice(), SETTINGS, say=said.append)
    token = result.chosen
    assert token is not None and token.text == "<|score|>" and token.id == 2
    assert result.responses > 20
    # -log 28, and 3 times the component of the normalised state, at most sqrt(32)
    assert -math.log(28) - 3 * math.sqrt(32) < token.mean < -10
    assert 0 < token.std < 1
    assert token.quantiles["0.01"] < token.quantiles["0.5"] < token.quantiles["0.99"]
    result.write(tmp_path)
    laser = yaml.safe_load((tmp_path / "laser.yaml").read_text())["laser"]
    weights = json.loads((tmp_path / "calibration.json").read_text())["weights"]
    assert weights.startswith("sha256:") and weights in (tmp_path / "laser.yaml").read_text()
    assert laser == {"score_token": "<|score|>", "ref_logprob": round(token.mean, 3), "beta": token.beta(0.1)}
    assert math.exp(token.mean) * math.expm1(1 / laser["beta"]) < 1e-3 * 1.05 or laser["beta"] > 1
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["chosen"] == "<|score|>" and len(written["tokens"]) == 1
    assert "candidates: <|score|>" in said


def test_without_a_spare_token_it_shows_what_to_run_and_that_works(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    bare = tmp_path / "bare"
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = ["<pad>", "<eos>", "x", "<unk>", *map(str, range(20)), "+", "\\boxed{", "}", "?"]
    save_word_tokenizer(bare, words)
    model.save_pretrained(bare)
    with pytest.raises(TestTimeError, match="no spare token") as caught:
        calibrate_model(
            load_model_folder(bare, with_score=False), folder / "train.jsonl", EngineChoice(), SETTINGS
        )
    assert how_to_add_a_token(bare.absolute()) in str(caught.value)
    code = textwrap.dedent(re.search(r"(    from transformers.*)", str(caught.value), re.DOTALL).group(1))
    target = tmp_path / "extended"
    exec(code.replace('"model-with-score-token"', repr(str(target))), {})
    added = load_model_folder(target, with_score=False)
    assert added.vocab_size == 29
    engine = FakeEngine(lambda token, sequence: -20.0)
    result = calibrate_model(added, folder / "train.jsonl", EngineChoice(), SETTINGS, engine=engine)
    assert result.chosen is not None and result.chosen.text == "<|score|>" and result.chosen.id == 28
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.get_output_embeddings().weight.shape[0] == 29


class FakeEngine:
    """Every response is one token and EOS; log-probs of tokens come from a table."""

    def __init__(self, logprobs, *, token=5, ends=(1,), reason="stop"):
        self.logprobs, self.token, self.ends, self.reason = logprobs, token, ends, reason

    def generate(self, prompts, sampling, *, deadline, on_finished=None):
        count = sampling.samples_per_prompt
        return [
            [
                Generation(
                    [self.token, self.ends[(i * count + j) % len(self.ends)]], [0.0, 0.0], self.reason, 0
                )
                for j in range(count)
            ]
            for i in range(len(prompts))
        ]

    def score(self, sequences, token_id, *, deadline):
        return [self.logprobs(token_id, sequence) for sequence in sequences]


def measured(folder, engine, **changes):
    from dataclasses import replace

    model = load_model_folder(folder, with_score=False, stop_token_ids=changes.pop("stop_token_ids", ()))
    settings = replace(SETTINGS, max_std=1.0, **changes)
    return calibrate_model(model, folder / "train.jsonl", EngineChoice(), settings, engine=engine)


def test_all_candidates_are_measured_in_one_pass(folder):
    calls = []

    class AllAtOnce(FakeEngine):
        def score(self, sequences, token_id, *, deadline):
            raise AssertionError("one token at a time")

        def score_tokens(self, sequences, token_ids, *, deadline):
            calls.append(list(token_ids))
            return [[self.logprobs(token, sequence) for token in token_ids] for sequence in sequences]

    def logprobs(token, sequence):
        return -20.0 - token + 0.1 * (len(sequence) % 3)

    tokens = ("<|score|>", "20", "21", "22")
    found = measured(folder, AllAtOnce(logprobs, token=21), tokens=tokens)
    assert calls == [[2, 20, 22]]
    assert found == measured(folder, FakeEngine(logprobs, token=21), tokens=tokens)
    assert [one.refused for one in found.tokens][2] == "the model generated it"


def test_a_token_that_varies_by_more_than_a_nat_is_refused_with_the_reason(folder):
    rng = np.random.default_rng(0)
    result = measured(folder, FakeEngine(lambda token, sequence: -20 + 1.3 * rng.normal()))
    assert result.chosen is None
    assert "varies by 1." in result.tokens[0].refused and "at most 1" in result.tokens[0].refused
    assert "No token will do" in result.text() and result.laser_yaml() == ""


def test_weights_that_are_overwritten_meanwhile_give_no_constants(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")

    def overwritten(token, sequence):
        (copy / "model.safetensors").write_bytes(b"others")
        return -20.0

    with pytest.raises(WeightsChanged, match="overwritten while they were in use"):
        measured(copy, FakeEngine(overwritten))


def test_a_token_that_the_model_generates_is_refused(folder):
    result = measured(folder, FakeEngine(lambda token, sequence: -20.0, token=2))
    assert result.chosen is None and result.tokens[0].refused == "the model generated it"


def test_end_tokens_with_different_constants_are_refused(folder):
    engine = FakeEngine(lambda token, sequence: -20.0 + 1.9 * (sequence[-1] == 1), ends=(1, 0))
    result = measured(folder, engine, stop_token_ids=(1, 0))
    assert result.chosen is None
    assert "differs by 1.90 nats between the EOS tokens 0, 1" in result.tokens[0].refused


def test_the_quieter_of_two_tokens_is_chosen(folder):
    def logprobs(token, sequence):
        return -22.0 + {2: 0.5, 3: 0.01}[token] * (-1) ** sequence[0]

    result = measured(folder, FakeEngine(logprobs), tokens=("2", "<unk>"))
    assert [token.id for token in result.tokens] == [2, 3]
    assert result.chosen is not None and result.chosen.id == 3


def test_too_few_finished_responses_give_no_constant(folder):
    with pytest.raises(TestTimeError, match="only 0 of 192 responses ended in a stop token"):
        measured(folder, FakeEngine(lambda token, sequence: -20.0, reason="length"))


def test_tokens_of_the_data_are_left_out(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "<|score|> 1 + 1 ?", "answer": "2"}\n')
    model = load_model_folder(folder, with_score=False)
    with pytest.raises(TestTimeError, match="every spare token occurs in"):
        calibrate_model(model, data, EngineChoice(), SETTINGS)


def test_named_tokens_that_do_not_fit_are_refused(folder):
    model = load_model_folder(folder, with_score=False)
    for name, message in (("1", "it ends responses"), ("99", "not among the model's ids")):
        with pytest.raises(TestTimeError, match=message):
            calibrate_model(
                model, folder / "train.jsonl", EngineChoice(), CalibrationSettings(tokens=(name,))
            )


def test_too_long_responses_are_refused_before_anything_is_loaded(folder):
    model = load_model_folder(folder, with_score=False)
    settings = CalibrationSettings(prompt_suffix="", apply_chat_template=False)
    with pytest.raises(TestTimeError, match=r"8192 \+ 1 is more than the model's max_position_embeddings 64"):
        calibrate_model(model, folder / "train.jsonl", EngineChoice(), settings)


def test_the_papers_constant_needs_no_larger_beta():
    quiet = TokenStatistics.of(
        SpareToken(151652, "<|vision_start|>", "media"),
        [-23.11 + 0.04 * (-1) ** i for i in range(300)],
        [1] * 300,
        max_std=1.0,
    )
    assert quiet.refused == "" and quiet.beta(0.1) == 0.1
    text = Calibration("qwen", 300, 300, 0.1, 1.0, [quiet]).text()
    assert "2.0e-06" in text  # Z - 1 at beta 0.1
    assert "is proposed" not in text


def test_a_small_vocabulary_gets_the_beta_that_it_needs():
    loud = TokenStatistics.of(
        SpareToken(2, "<|score|>", "reserved"), [-11.0, -11.2] * 50, [1] * 100, max_std=1.0
    )
    beta = loud.beta(0.1)
    assert beta > 0.2 and math.exp(loud.mean) * math.expm1(1 / beta) <= 1e-3
    text = Calibration("tiny", 100, 100, 0.1, 1.0, [loud]).text()
    assert f"{beta:g} is proposed" in text and "probability 0.3" in text
