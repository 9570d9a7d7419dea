"""The scripts of examples/ start trainer and servers where they say, seen by stand-ins for python and Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.source_tree import ROOT

LAUNCH = ROOT / "examples" / "launch"
RECIPES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/config.json"))

# Says what it was asked for; `serve` without --wait runs until it is told to stop.
PYTHON = """#!/usr/bin/env bash
echo "gpus=${CUDA_VISIBLE_DEVICES:-} rank=${NODE_RANK:-} nodes=${NNODES:-} $*" >>"$CALLS"
case "$*" in
*--wait*) exit "${WAIT_STATUS:-0}" ;;
*" serve "*)
  [ -z "${SERVE_STATUS:-}" ] || exit "$SERVE_STATUS"
  trap 'echo "serve ended" >>"$CALLS"; exit 0' TERM
  while :; do sleep 0.05; done ;;
*) sleep "${TRAIN_SECONDS:-0}"; exit "${TRAIN_STATUS:-0}" ;;
esac
"""
# One process a node, numbered within the step, all in one process group, as srun's signals reach all of them.
SRUN = """#!/usr/bin/env bash
names='' command=()
while [ $# -gt 0 ]; do
  case "$1" in
  --nodelist=*) names=${1#*=} ;;
  --*) ;;
  *) command=("$@"); break ;;
  esac
  shift
done
echo "srun on ${names:-all}: ${command[*]:0:2}" >>"$CALLS"
pids=() number=0
for name in ${names//,/ }; do
  SLURM_PROCID=$number ROLLOUT_HOST=10.0.0.$((10 + number)) "${command[@]}" &
  pids+=($!) number=$((number + 1))
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null; wait' TERM
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = "#!/bin/sh\nprintf '%s\\n' n1 n2 n3 n4 n5 n6 n7 n8\n"


@pytest.fixture
def run(tmp_path):
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def start(script: Path, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
        environment = os.environ | {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            "CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-8]",
        }
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        done = subprocess.run(
            ["bash", str(script), *arguments],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return start


def of(calls, word):
    return [line for line in calls if word in line]


def test_one_node_gives_trainer_and_servers_gpus_of_their_own(run):
    status, calls, errors = run(LAUNCH / "one_node.sh", "RUN.yaml", "run.seed=2")
    assert status == 0, errors
    (serve,) = [line for line in of(calls, " serve ") if "--wait" not in line]
    assert serve.startswith("gpus=4,5,6,7 ") and serve.endswith("-m megatron_laser serve RUN.yaml run.seed=2")
    (train,) = of(calls, " train ")
    assert train.startswith("gpus=0,1,2,3 ")
    assert "--nproc-per-node 4 " in train and train.endswith("train RUN.yaml run.seed=2")
    assert calls.index(of(calls, "--wait 1")[0]) < calls.index(train)
    assert calls[-1] == "serve ended"


def test_one_node_passes_on_the_trainers_status_and_other_gpus(run):
    status, calls, _ = run(
        LAUNCH / "one_node.sh", "RUN.yaml", TRAIN_GPUS="0,1", ROLLOUT_GPUS="2,3,4,5,6,7", TRAIN_STATUS="3"
    )
    assert status == 3
    assert "--nproc-per-node 2 " in of(calls, " train ")[0]
    assert calls[-1] == "serve ended"


def test_one_node_does_not_train_without_servers(run):
    status, calls, _ = run(LAUNCH / "one_node.sh", "RUN.yaml", SERVE_STATUS="1", WAIT_STATUS="1")
    assert status != 0
    assert not of(calls, " train ")


def test_one_node_ends_both_when_it_is_told_to(run, tmp_path):
    environment = os.environ | {
        "PYTHON": str(tmp_path / "python"),
        "CALLS": str(tmp_path / "calls"),
        "TRAIN_SECONDS": "60",
    }
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "one_node.sh"), "RUN.yaml"], env=environment, start_new_session=True
    )
    try:
        until = time.monotonic() + 30
        while not of(
            (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else [], " train "
        ):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 130
        assert "serve ended" in (tmp_path / "calls").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_nodes_apart_train_on_the_first_and_generate_on_the_others(run):
    status, calls, errors = run(
        LAUNCH / "slurm_apart.sh", "RUN.yaml", "run.seed=2", TRAIN_NODES="5", PROCESSES_PER_NODE="8"
    )
    assert status == 0, errors
    assert of(calls, "srun on n6,n7,n8: bash") and of(calls, "srun on n1,n2,n3,n4,n5: bash")
    serves = [line for line in of(calls, " serve ") if "--wait" not in line]
    assert sorted(line.split("rollout.sglang.host=")[1] for line in serves) == [
        "10.0.0.10",
        "10.0.0.11",
        "10.0.0.12",
    ]
    trains = of(calls, " train ")
    assert sorted(line.split()[1] for line in trains) == [f"rank={rank}" for rank in range(5)]
    assert all("nodes=5" in line and "--master-addr n1 --master-port 24711" in line for line in trains)
    assert all(line.endswith("train RUN.yaml run.seed=2") for line in trains)
    (wait,) = of(calls, "--wait 3")
    assert "rank=0" in wait
    assert len(of(calls, "serve ended")) == 3


@pytest.mark.parametrize("nodes", ["8", "9"])
def test_nodes_apart_leave_at_least_one_to_generate(run, nodes):
    status, calls, errors = run(LAUNCH / "slurm_apart.sh", "RUN.yaml", TRAIN_NODES=nodes)
    assert status == 2
    assert "at least one must be left to generate" in errors
    assert not calls


def test_a_rollout_node_is_never_bound_to_loopback(run):
    status, calls, errors = run(LAUNCH / "serve_node.sh", "RUN.yaml", ROLLOUT_HOST="127.0.1.1")
    assert (status, calls) == (2, [])
    assert "set ROLLOUT_HOST" in errors


@pytest.mark.parametrize("name", RECIPES)
def test_the_slurm_script_of_a_recipe_starts_its_run(run, name):
    script = ROOT / "examples" / name / "slurm.sh"
    status, calls, errors = run(script, "grpo", "run.seed=2", PROCESSES_PER_NODE="8")
    assert status == 0, errors
    if name == "qwen2.5_32b":
        expected = f"{ROOT}/examples/{name}/grpo.yaml run.seed=2"
        assert len(of(calls, f"train {expected}")) == 4
    else:
        assert calls == ["srun on all: bash " + str(LAUNCH / "one_node.sh")]
    status, _, errors = run(script, "other")
    assert status == 2
    assert "other.yaml is not there" in errors


@pytest.mark.parametrize("script", sorted((ROOT / "examples").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_say_how_to_use_them(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[1].startswith("# ")
