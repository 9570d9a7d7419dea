"""The scripts of examples/ start trainer and servers where they say, seen by stand-ins for python and Slurm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.executables import write_executable
from helpers.source_tree import ROOT

LAUNCH = ROOT / "examples" / "launch"
RECIPES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/config.json"))

# Says what it was asked for; `serve` without --wait runs until it is told to stop.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then printf '%s' "${RUN_FOLDER:-}"; exit; fi # asked for run.output_dir
if [ "$3" = status ]; then [ "$*" = "-m megatron_laser status $RUN_FOLDER --exit-status" ]; exit "$RUN_STATUS"; fi
echo "gpus=${CUDA_VISIBLE_DEVICES:-} rank=${NODE_RANK:-} nodes=${NNODES:-} $*" >>"$CALLS"
echo "environment of $2: cumem=$NCCL_CUMEM_ENABLE nvls=$NCCL_NVLS_ENABLE jit=${TRITON_CACHE_DIR:-}" \
  "alloc=${PYTORCH_CUDA_ALLOC_CONF:-}" >>"$CALLS"
case "$*" in
*--wait*) exit "${WAIT_STATUS:-0}" ;;
*" serve "*)
  [ -z "${SERVE_STATUS:-}" ] || exit "$SERVE_STATUS"
  trap 'echo "serve ended" >>"$CALLS"; exit 0' TERM
  while :; do sleep 0.05; done ;;
*) # torchrun: with RANKS, ranks that save and end when they are asked to
  for ((rank = 0; rank < ${RANKS:-0}; rank++)); do "$REAL_PYTHON" -S -c "$RANK" & done
  wait
  sleep "${TRAIN_SECONDS:-0}"; exit "${TRAIN_STATUS:-0}" ;;
esac
"""
RANK = """
import os, signal, sys
with open(os.environ["CALLS"], "a") as calls:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(calls.write("rank saves\\n") and 0))
    print("rank runs", file=calls, flush=True)
    signal.pause()
"""
SHARED = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "JIT_CACHE", "TRITON_CACHE_DIR")
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
[ -n "$names" ] || names=${ALL_NODES:-}
for name in ${names//,/ }; do
  SLURM_NODEID=$number SLURM_PROCID=$number ROLLOUT_HOST=10.0.0.$((10 + number)) "${command[@]}" &
  pids+=($!) number=$((number + 1))
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null; wait' TERM
trap 'signalled=1; kill -USR1 "${pids[@]}" 2>/dev/null' USR1
status=0
for pid in "${pids[@]}"; do
  while :; do
    signalled='' last=0
    wait "$pid" || last=$?
    [ -n "$signalled" ] || break
  done
  [ "$last" = 0 ] || status=$last
done
exit $status
"""
SCONTROL = "printf '%s\\n' n1 n2 n3 n4 n5 n6 n7 n8"


@pytest.fixture
def run(tmp_path):
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
        write_executable(tmp_path / name, text)
    calls = tmp_path / "calls"

    def start(
        script: Path,
        *arguments: str,
        meanwhile: Callable[[subprocess.Popen], None] = lambda _: None,
        **variables: str,
    ) -> tuple[int, list[str], str]:
        environment = os.environ | {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            "CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "REAL_PYTHON": sys.executable,
            "RANK": RANK,
        }
        for name in ("CUDA_VISIBLE_DEVICES", *SHARED, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            environment.pop(name, None)
        process = subprocess.Popen(
            ["bash", str(script), *arguments],
            env=environment | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        try:
            meanwhile(process)
            _, errors = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, seen(), errors

    def seen() -> list[str]:
        return calls.read_text().splitlines() if calls.exists() else []

    start.seen = seen
    return start


@pytest.fixture
def ask_to_save(run):
    """Sends SIGUSR1 to a script, as Slurm does to a batch shell before the time limit, once `ranks` ranks run."""

    def after(ranks: int) -> Callable[[subprocess.Popen], None]:
        def ask(process: subprocess.Popen) -> None:
            until = time.monotonic() + 30
            while len(of(run.seen(), "rank runs")) < ranks:
                assert time.monotonic() < until and process.poll() is None, run.seen()
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)

        return ask

    return after


def of(calls, word):
    return [line for line in calls if word in line and not line.startswith("environment")]


def environments(calls):
    return {line for line in calls if line.startswith("environment")}


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
    # torchrun gives the other nodes 900 seconds, servers may need more: nobody starts it before they answer
    waits = of(calls, "--wait 3")
    assert sorted(line.split()[1] for line in waits) == [f"rank={rank}" for rank in range(5)]
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
    if name in ("qwen2.5_32b", "qwen3_30b_a3b"):
        expected = f"{ROOT}/examples/{name}/grpo.yaml run.seed=2"
        assert len(of(calls, f"train {expected}")) == 4
    else:
        assert calls == ["srun on all: bash " + str(LAUNCH / "one_node.sh")]
    status, _, errors = run(script, "other")
    assert status == 2
    assert "other.yaml is not there" in errors


@pytest.mark.parametrize(
    ("script", "arguments", "expected", "nodes", "trainers"),
    [
        ("qwen2.5_32b/slurm.sh", ["laser_32k"], "qwen2.5_32b/laser_32k.yaml", 8, 4),
        ("qwen3_30b_a3b/slurm_4_nodes.sh", [], "qwen3_30b_a3b/laser_4_nodes.yaml", 4, 2),
    ],
)
def test_the_slurm_script_of_a_variant_starts_it_on_its_nodes(
    run, tmp_path, script, arguments, expected, nodes, trainers
):
    names = " ".join(f"n{number + 1}" for number in range(nodes))
    write_executable(tmp_path / "scontrol", f"printf '%s\\n' {names}")
    path = ROOT / "examples" / script
    assert f"#SBATCH --nodes={nodes}\n" in path.read_text()
    status, calls, errors = run(path, *arguments, "run.seed=2", PROCESSES_PER_NODE="8")
    assert status == 0, errors
    command = f"{ROOT}/examples/{expected} run.seed=2"
    assert len(of(calls, f"train {command}")) == trainers
    assert len([call for call in of(calls, f"serve {command}") if "--wait" not in call]) == nodes - trainers


def test_trainer_and_servers_have_one_setting_of_nccls_memory_and_one_place_for_kernels(run):
    _, calls, _ = run(LAUNCH / "one_node.sh", "RUN.yaml", JIT_CACHE="/cache")
    assert environments(calls) == {
        "environment of megatron_laser: cumem=0 nvls=0 jit=/cache/triton alloc=",
        "environment of torch.distributed.run: cumem=0 nvls=0 jit=/cache/triton alloc=expandable_segments:True",
    }


def test_what_the_cluster_has_set_stays(run):
    own = {"NCCL_CUMEM_ENABLE": "1", "TRITON_CACHE_DIR": "/mine", "PYTORCH_ALLOC_CONF": "a:1"}
    _, calls, _ = run(LAUNCH / "one_node.sh", "RUN.yaml", JIT_CACHE="/cache", **own)
    found = {line.split(": ")[1] for line in environments(calls)}
    assert found == {"cumem=1 nvls=0 jit=/mine alloc="}


def test_memory_that_colocated_servers_are_handed_is_not_of_expandable_segments(run, tmp_path):
    (tmp_path / "RUN.yaml").write_text("rollout:\n  weight_sync: colocated\n")
    for arguments in (("RUN.yaml",), ("other.yaml", "rollout.weight_sync=colocated")):
        status, calls, errors = run(LAUNCH / "node.sh", *arguments, PROCESSES_PER_NODE="1")
        assert status == 0, errors
        assert all(line.endswith(" alloc=") for line in environments(calls))


@pytest.mark.parametrize(
    ("script", "variables", "ranks"),
    [
        ("one_node.sh", {"RANKS": "2"}, 2),
        ("slurm.sh", {"RANKS": "1", "ALL_NODES": "n1,n2", "PROCESSES_PER_NODE": "1"}, 2),
        ("slurm_apart.sh", {"RANKS": "1", "TRAIN_NODES": "6", "PROCESSES_PER_NODE": "1"}, 6),
    ],
)
def test_before_the_time_limit_the_trainer_alone_saves_and_ends(run, ask_to_save, script, variables, ranks):
    status, calls, errors = run(LAUNCH / script, "RUN.yaml", meanwhile=ask_to_save(ranks), **variables)
    assert status == 0, errors
    assert len(of(calls, "rank saves")) == ranks
    last = max(index for index, line in enumerate(calls) if line == "rank saves")
    assert all(index > last for index, line in enumerate(calls) if line == "serve ended")


def test_every_slurm_script_asks_for_a_signal_before_the_time_limit():
    for script in (ROOT / "examples").rglob("slurm.sh"):
        assert "\n#SBATCH --signal=B:USR1@900\n" in script.read_text(), script


@pytest.mark.parametrize("script", sorted((ROOT / "examples").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_say_how_to_use_them(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[1].startswith("# ")


def test_the_environment_for_gpus_goes_before_the_one_for_cpus(tmp_path):
    def chosen(**variables):
        script = f"source {LAUNCH / 'common.sh'}; find_python {tmp_path}"
        environment = {"PATH": os.environ["PATH"]} | variables
        return subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=20
        ).stdout

    assert chosen() == "python"
    for name in (".venv", ".venv-gpu"):
        interpreter = tmp_path / name / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.symlink_to(sys.executable)
        assert chosen() == str(interpreter)
    assert chosen(PYTHON="/opt/python") == "/opt/python"


@pytest.mark.parametrize(
    "torchrun, run_says, node_rank, expected",
    [("0", "3", "0", 3), ("1", "0", "0", 0), ("0", "3", "1", 0), ("1", None, "0", 1)],
)
def test_node_zero_ends_with_what_the_run_says_of_its_end(run, torchrun, run_says, node_rank, expected):
    """torchrun ends with 0 after a stop, and with 1 after a signal to it."""
    said = {} if run_says is None else {"RUN_FOLDER": "runs/out", "RUN_STATUS": run_says}
    node = {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": node_rank}
    status, _, errors = run(
        LAUNCH / "node.sh", "RUN.yaml", TRAIN_STATUS=torchrun, PROCESSES_PER_NODE="1", **said, **node
    )
    assert status == expected, errors
