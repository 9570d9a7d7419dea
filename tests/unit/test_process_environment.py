"""Numbers from the environment: empty is not set, anything else that is no number is one line."""

import pytest

from megatron_laser.config import ConfigError
from megatron_laser.config.process_environment import (
    drop_empty_numbers,
    environment_int,
    is_main_process,
    openmp_threads,
    place_in_run,
    read_place,
)
from megatron_laser.rollout.servers.command import child_environment

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture
def variables(monkeypatch):
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_empty_is_not_set(text):
    assert environment_int("N", None, environment={"N": text}) is None
    assert environment_int("N", 7, environment={"N": text}) == 7
    assert environment_int("N", 7, environment={}) == 7
    place = read_place(dict.fromkeys(NUMBERS, text))
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (None, 1, 0, 1)


@pytest.mark.parametrize("text", ["two", "1.5", "-1", "0x2", "2,1", "1e3"])
def test_what_is_no_number_is_one_line_with_the_variable(text):
    with pytest.raises(
        ConfigError, match=f"environment variable WORLD_SIZE={text}: expected an integer of 1 or more"
    ):
        read_place({"WORLD_SIZE": text})


def test_a_launchers_numbers():
    names = {
        "RANK": "5",
        "WORLD_SIZE": " 8 ",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_PORT": "29500",
    }
    place = read_place(names)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert read_place({"RANK": "0", "WORLD_SIZE": "8"}).local_world_size == 8


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 without RANK"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=1"),
        ({"RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_numbers_that_contradict_each_other(variables, names, message):
    variables(**names)
    with pytest.raises(ConfigError, match=message):
        place_in_run()


@pytest.mark.parametrize(("text", "threads"), [("", None), ("3", 3), ("2,1", 2), (" 4 , 2 , 1 ", 4)])
def test_openmps_list_has_a_number_for_each_level(text, threads):
    assert openmp_threads({"OMP_NUM_THREADS": text}) == threads


@pytest.mark.parametrize("text", ["many", "2,many", "2,,1", "0", ",2", "2,"])
def test_threads_that_are_no_numbers(text):
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS="):
        openmp_threads({"OMP_NUM_THREADS": text})


def test_empty_numbers_are_unset_before_libraries_read_them(variables, monkeypatch):
    import os

    variables(OMP_NUM_THREADS="", RANK="", WORLD_SIZE="2")
    drop_empty_numbers()
    assert "OMP_NUM_THREADS" not in os.environ and "RANK" not in os.environ
    assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("given", "main"),
    [
        ({"RANK": ""}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "12", "WORLD_SIZE": "16"}, False),
        # An environment that is broken: there may be no rank 0 that says so.
        ({"RANK": "x", "WORLD_SIZE": "2"}, True),
        ({"RANK": "5"}, True),
        ({"RANK": "2", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "two"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "x"}, True),
    ],
)
def test_who_says_what_is_wrong(variables, given, main):
    variables(**given)
    assert is_main_process() is main


def test_servers_get_no_empty_numbers():
    child = child_environment({"SGLANG_TIMEOUT_KEEP_ALIVE": "", "HF_HUB_OFFLINE": ""}, python="p", mark="m")
    assert child["SGLANG_TIMEOUT_KEEP_ALIVE"] == "120" and child["HF_HUB_OFFLINE"] == "1"
