"""Multiple choice and short texts: what models write, accepted and refused; votes; data that cannot be used."""

from __future__ import annotations

import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from megatron_laser.data import Row, read_rows, unusable_findings
from megatron_laser.rewards import GradingPool, answer_form, equivalence_classes, known_rewards, trial
from megatron_laser.rewards.general.choices import extract_choice, multiple_choice, read_choice
from megatron_laser.rewards.general.short_text import free_text, same_text
from megatron_laser.rewards.general.stated import stated_answer
from megatron_laser.testtime.voting import choose

OPTIONS = json.dumps({"answer": "C", "options": ["Rome", "a cat, or B", "Paris", "12 m/s"]})

NAMES_C = [
    r"\boxed{C}",
    r"\boxed{(C)}",
    r"\boxed{\text{C}}",
    r"\boxed{\text{(C)}}",
    r"\boxed{\mathrm{C}}",
    r"\boxed{\textbf{(C) } \text{Paris}}",
    r"\boxed{C.}",
    r"\boxed{C. Paris}",
    r"\boxed{C: \text{Paris}}",
    r"\boxed{c}",
    r"\boxed{Option C}",
    r"\boxed{C, since Paris}",
    r"So the answer is $\boxed{\textbf{(C)}}$.",
    r"\boxed{A} is tempting, but it is \boxed{C}",
    "The answer is (C).",
    "The answer is C",
    "the answer is c.",
    "The answer is C) Paris",
    "The answer is C. Paris is in France.",
    "The answer is **(C)**. I am sure of it.",
    "The answer is option C because Paris is the capital.",
    "The answer is A. Wait, that is wrong. The answer is C.",
    "The answer to the question is C.",
    "The correct answer is choice (C): Paris",
    "The correct option is C.",
    "The best answer is therefore C",
    "Therefore, the final answer is: $C$",
    "My answer is C!",
    "Answer: C",
    "Answer: (C) Paris",
    "**Answer:** C",
    "**Answer: C**",
    "### Final Answer:\n\n[C]",
    "Answer\u00a0: C",
]
DOES_NOT_NAME_C = [
    r"\boxed{A}",
    r"\boxed{E}",
    r"\boxed{A, C}",
    r"\boxed{C, D}",
    r"\boxed{(A) or (C)}",
    r"\boxed{C \text{ and } D}",
    r"\boxed{C/D}",
    r"\boxed{(C)(D)}",
    r"\boxed{AC}",
    r"\boxed{CO}",
    r"\boxed{x = C}",
    r"\boxed{\text{not C}}",
    r"\boxed{}",
    r"\boxed{C",
    r"\boxed{C} no, \boxed{D}",
    "C",
    "I like option C.",
    "The answer is not C.",
    "The answer is C or D.",
    "The answer is between B and C.",
    "The answer is a cat.",
    "The answer is A, not C.",
    "Option C is wrong, the answer is D.",
    "The answer is C. But no: the answer is B.",
    "Answer: none of the above",
    "",
]


@pytest.mark.parametrize("reference", ["C", "(C)", " c. ", "C. Paris", r"$\boxed{C}$", OPTIONS])
def test_the_right_letter_is_read_in_every_spelling(reference):
    assert [one for one in NAMES_C if multiple_choice(one, reference).outcome != "correct"] == []


@pytest.mark.parametrize("reference", ["C", OPTIONS])
def test_another_letter_several_letters_and_none_are_not_right(reference):
    assert [one for one in DOES_NOT_NAME_C if multiple_choice(one, reference).reward] == []


def test_outcomes_tell_no_answer_from_one_that_names_no_option():
    assert multiple_choice("It is C", "C").outcome == "no_answer"
    for several in (r"\boxed{A, C}", r"\boxed{}", r"\boxed{C"):
        assert multiple_choice(several, "C").outcome == "unparsable"
    assert multiple_choice("The answer is a cat", OPTIONS).outcome == "unparsable"
    assert multiple_choice(r"\boxed{E}", OPTIONS).outcome == "unparsable"  # there is no fifth option
    assert multiple_choice(r"\boxed{D}", OPTIONS).outcome == "wrong"


def test_an_options_text_counts_where_the_options_are_known():
    for response in (r"\boxed{Paris}", "The answer is Paris.", r"\boxed{\text{paris}}"):
        assert multiple_choice(response, OPTIONS).outcome == "correct"
        assert multiple_choice(response, "Paris").outcome == "correct"
        assert multiple_choice(response, "C").outcome == "wrong"
    assert multiple_choice(r"\boxed{Rome}", OPTIONS).outcome == "wrong"
    assert (
        multiple_choice(r"\boxed{C. Rome}", OPTIONS).outcome == "unparsable"
    )  # the letter of one, the text of another


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("B", ["x", "y"], "B"),
        (0, ["x", "y"], "A"),
        ("y", ["x", "y"], "B"),
        ("b", {"A": "x", "B": "y"}, "B"),
        ("B", ["B", "AB", "A"], "A"),  # a blood group: the text is meant, where there is one
        ("I", ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], "I"),
        ("2", ["1", "2"], "B"),
    ],
)
def test_references_with_options(answer, options, letter):
    assert read_choice(json.dumps({"answer": answer, "options": options})).letter == letter


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "empty"),
        ('{"answer": "C"}', "options"),
        ('{"answer": "C", "options": ["x", "y"]}', "'C' is none of the 2 options"),
        ('{"answer": 2, "options": ["x", "y"]}', "2 is none of the 2 options"),
        ('{"answer": "A", "options": ["x"]}', "expected 2 to 26"),
        ('{"answer": "A", "options": {"A": "x", "C": "y"}}', "letters from A on"),
        ('{"answer": }', "JSON object"),
    ],
)
def test_references_that_cannot_be_used_are_refused_before_a_run_and_give_no_grade(reference, message):
    with pytest.raises(ValueError, match=message):
        multiple_choice(r"\boxed{C}", reference)
    unusable = answer_form("multiple_choice").unusable
    assert unusable is not None
    rows = [
        Row(place, "", text, f"data.jsonl:{place + 1}") for place, text in enumerate(["C", "A", reference])
    ]
    (finding,) = unusable_findings(rows, unusable)
    assert finding.level == "warning" and "1 of 3" in finding.text and "data.jsonl:3" in finding.examples[0]
    assert unusable_findings(rows[2:], unusable)[0].level == "error"
    assert unusable_findings(rows[:2], unusable)[0].level == "ok"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_options_in_a_column_of_their_own_become_a_part_of_the_reference(tmp_path, suffix):
    records = [
        {"problem": "?", "answer": "B", "options": ["x", "y"]},
        {"problem": "?", "answer": "A", "options": None},
    ]
    file = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    keys = {"prompt_key": "problem", "answer_key": "answer", "mathematics": False}
    first, second = read_rows(file, options_key="options", **keys)
    assert json.loads(first.answer) == {"answer": "B", "options": ["x", "y"]} and second.answer == "A"
    assert multiple_choice(r"\boxed{y}", first.answer).outcome == "correct"
    assert multiple_choice(r"\boxed{x}", first.answer).outcome == "wrong"
    assert multiple_choice(r"\boxed{B}", first.answer).outcome == "correct"
    assert multiple_choice(r"\boxed{z}", first.answer).outcome == "unparsable"
    small = json.dumps({"answer": "a", "options": ["b", "a"]})  # the text a is the option B
    assert [multiple_choice(f"\\boxed{{{one}}}", small).reward for one in ("B", "a", "A", "b")] == [
        1,
        1,
        0,
        0,
    ]
    assert [row.answer for row in read_rows(file, **keys)] == [
        "B",
        "A",
    ]  # to any other verifier a column is a column
    without = tmp_path / f"without.{suffix}"
    if suffix == "jsonl":
        without.write_text('{"problem": "?", "answer": "B"}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": "?", "answer": "B"}]), without)
    assert [row.answer for row in read_rows(without, options_key="options", **keys)] == ["B"]


SAME = [
    ("Paris", "paris"),
    ("The Mona Lisa", "mona lisa"),
    ("an inelastic collision", "Inelastic collision"),
    ("the Treaty of Versailles.", "Treaty of Versailles"),
    (r"\text{Photo-electric effect}", "photo electric effect"),
    ("U.S.", "US"),
    ("COVID-19", "covid 19"),
    ("research & development", "Research and Development"),
    ("“supply” and demand", "Supply and demand"),
    ("two", "2"),
    ("H_2O", "H2O"),
    (r"\mathrm{H_2SO_4}", "H2SO4"),
    ("3 PM", "3 pm"),
    ("Yes, because energy is kept.", "yes"),
    ("No.", "no"),
    ("0.5", r"\frac{1}{2}"),
    ("1,200", "$1200"),
    ("50%", r"50\%"),
    ("10 percent", "10%"),
    ("y + x", "x + y"),
    (r"\sqrt{2}", "2^{1/2}"),
    ("(1,2)", "(1, 2)"),
    ("12 m/s", r"12\,\text{m/s}"),
    ("12 m/s", "12 meters per second"),
    ("12", "12 m/s"),
    ("9.8 m/s²", r"9.8 \mathrm{~m/s^2}"),
    ("12.5 kJ/mol", "12.5"),
    ("0.25 mol/L", "0.250 mol/L"),
    ("12 kg·m/s", "12 kg m/s"),
    ("25 degrees Celsius", r"25^\circ C"),
    ("4 Ω", "4 ohms"),
    ("2 moles", "2 mol"),
    ("5 apples", r"5 \text{ apples}"),
    ("1.6e-19 C", r"1.6 \times 10^{-19} C"),
    ("5 million", "5000000"),
]
DIFFERENT = [
    ("London", "Paris"),
    ("god", "dog"),
    ("not Paris", "Paris"),
    ("Paris and London", "Paris"),
    ("world war 1", "World War 2"),
    ("increase", "decrease"),
    ("log n", "n log n"),
    ("yes", "no"),
    ("true", "yes"),
    ("yes", "No, because it is not."),
    ("12 km/h", "12 m/s"),
    ("13 m/s", "12 m/s"),
    ("10 mW", "10 MW"),
    ("5 kg", "5 g"),
    ("12.5 kJ/mol", "12.5 J/mol"),
    ("25 K", "25 °C"),
    ("10 am", "10 pm"),
    ("10 pm", "10"),
    ("5 thousand", "5"),
    ("5 K", "5"),
    ("5 more", "5"),
    ("5 to 6", "5"),
    ("3 or 4", "3"),
    ("-5", "5"),
    ("1.5", "15"),
    ("5!", "5"),
    ("10²", "102"),
    ("2 3", "23"),
    ("x y", "x-y"),
    ("(1,2)", "(2,1)"),
    ("H2O", "H2O2"),
    ("CO", "CO2"),
    (r"\alpha", r"\beta"),
    ("1.6e-19 C", "1.6e-18 C"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_another_spelling_of_the_reference_is_right_both_ways_round(left, right):
    for found, reference in ((left, right), (right, left)):
        assert free_text(f"\\boxed{{{found}}}", reference).outcome == "correct"


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_what_says_something_else_is_wrong_both_ways_round(left, right):
    for found, reference in ((left, right), (right, left)):
        assert free_text(f"\\boxed{{{found}}}", reference).outcome == "wrong"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is St. Louis. It is a city.", "St. Louis"),
        ("Final answer: **Paris**", "Paris"),
        ("The answer is Rome. No. The answer is \\boxed{Paris}", "Paris"),
        ("Answer: 9.8 m/s^2.", "9.8 m/s^2"),
        ("The answer is:\nPhotosynthesis", "photosynthesis"),
        ("The answer is clearly the mitochondrion!", "Mitochondrion"),
    ],
)
def test_texts_are_found_in_sentences(response, answer):
    assert free_text(response, answer).outcome == "correct"


def test_free_text_tells_no_answer_from_a_broken_box():
    assert free_text("Paris", "Paris").outcome == "no_answer"
    assert free_text("It is \\boxed{Paris", "Paris").outcome == "unparsable"
    assert free_text("I think this answer is right.", "right").outcome == "no_answer"
    with pytest.raises(ValueError, match="empty"):
        free_text("\\boxed{x}", " ")


def test_hostile_texts_take_no_time():
    hostile = ["\n" * 50_000, "the answer " * 20_000, "answer" + " " * 50_000, "Answer: " + "(C) " * 400]
    hostile += [
        "\\boxed{" + "\\text{" * 300 + "}" * 301,
        "\\boxed{" + "5 " * 900 + "}",
        "the final " * 20_000,
    ]
    started = time.process_time()
    for text in hostile:
        stated_answer(text), multiple_choice(text, OPTIONS), extract_choice(text, "C")
    assert time.process_time() - started < 2.0  # 0.1 s


def test_both_are_known_by_name_and_grade_in_workers_with_votes_of_their_own():
    assert {"multiple_choice", "free_text"} <= set(known_rewards())
    assert [finding.level for finding in trial("free_text")] == ["ok"]
    with GradingPool(workers=1, function="free_text") as pool:
        pairs = [
            (r"\boxed{the cell}", "Cell"),
            (r"\boxed{x+1}", "1+x"),
            (r"\boxed{12 J}", "12 N"),
            ("?", "x"),
        ]
        assert [grade.outcome for grade in pool.grade_many(pairs)] == [
            "correct",
            "correct",
            "wrong",
            "no_answer",
        ]
        texts = [
            r"\boxed{The cell}",
            "The answer is cell.",
            r"\boxed{1+x}",
            r"\boxed{x+1}",
            "no idea",
            r"\boxed{cells}",
        ]
        answers = [pool.form.extract(text, "cell") for text in texts]
        assert equivalence_classes(answers, pool=pool, form=pool.form) == [0, 0, 1, 1, None, 2]
        assert pool.source_fingerprints() == {}  # no code of the user's
    form = answer_form("multiple_choice")
    texts = [r"\boxed{C}", "The answer is (C) Paris.", r"\boxed{Paris}", r"\boxed{A}", r"\boxed{A, C}"]
    assert [form.extract(text, OPTIONS) for text in texts] == ["C", "C", "C", "A", None]
    classes = equivalence_classes([form.extract(text, OPTIONS) for text in texts], form=form)
    assert classes == [0, 0, 0, 1, None]


def test_the_proxy_votes_with_the_verifier_that_the_model_was_trained_with():
    letters = ["The answer is (C).", r"\boxed{A}", r"\boxed{\text{(C)}}", "Answer: c"]
    choice = choose(letters, [0.2, 0.9, 0.3, 0.1], vote="majority", form=answer_form("multiple_choice"))
    assert (choice.index, choice.answer, choice.share, choice.classes) == (2, "C", 0.75, [0, 1, 0, 0])
    texts = ["The answer is the mitochondrion.", r"\boxed{Mitochondrion}", r"\boxed{ribosome}"]
    choice = choose(texts, [0.4, 0.5, 0.8], form=answer_form("free_text"))
    assert (choice.index, choice.classes) == (1, [0, 0, 1])


def test_the_relation_is_symmetric_on_all_examples():
    for left, right in (*SAME, *DIFFERENT):
        assert same_text(left, right) == same_text(right, left)
