"""The recipes of docs/clusters.md: its commands for localhost and its Slurm scripts, run in two processes on this CPU.

What one process computes, two must, from the same base and over the checkpoints of the other. The base of the runs in
JAX comes from the two processes, that of the runs in torch from the one.
"""

import ast
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import documents
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

import interop
from interop.shapes import factor_shapes

ROOT = documents.ROOT
CONFIGS = ROOT / "examples" / "configs"
PAGE = ROOT / "docs" / "clusters.md"
FLAX, TORCH = "13_multi_host_flax", "14_multi_node_torch"
PATIENCE = 600  # seconds for all processes of a run: 20 on two free cores, and more on a machine with other work
STEPS = 8  # of --smoke
NOISE = {"rtol": 1e-5, "atol": 1e-5}  # of losses: sums over devices come in another order
DRIFT = {"rtol": 1e-3, "atol": 1e-4}  # of factors, as Adam divides small gradients by small ones

SRUN = """#!/bin/bash
# Starts the tasks of a job as srun does, here.
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=$i "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit ${code:-0}
"""


def console(*words):
    """The one console block of the page with all of these words."""
    found = [block for block in documents.blocks(PAGE) if block.language == "console"]
    (block,) = [block for block in found if all(word in block.code for word in words)]
    return "\n".join(documents.commands(block))


def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def shell(code, folder, **environment):
    """What the commands print, run where `examples` is. Whatever happens, no process of theirs is left."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile faster
    log = folder / "log.txt"
    with log.open("w") as output:
        bash = ["bash", "-euo", "pipefail", "-c", code]
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(bash, cwd=folder, env=clean | environment, start_new_session=True, **streams)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    text = log.read_text()
    assert process.returncode == 0, f"{code}\nexit code {process.returncode} after {PATIENCE} s at most\n{text[-6000:]}"
    return text


def slurm(script, folder, *, port_of_job, **environment):
    """What a Slurm script prints as a job of two tasks, on two nodes that are both this machine."""
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1\necho other\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = next(job for job in range(1000, 5000) if is_free(port_of_job(job)))
    names = {"JOB_ID": job, "NTASKS": 2, "NNODES": 2, "STEP_NUM_NODES": 2, "JOB_NODELIST": "here,other"}
    names |= {"STEP_NODELIST": "localhost"}
    variables = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return shell(f"bash examples/configs/{script} --smoke", folder, **variables, **environment)


def start(folder, example, source, *parts):
    """The folder that an example writes to, with parts of what an earlier run has left."""
    out = folder / "runs" / example
    out.mkdir(parents=True)
    for part in parts:
        shutil.copytree(source / part, out / part)
    return out


def assert_same_adapter(got, want, **tolerance):
    """Whole arrays, trained, of the same base and bases, and nothing else in the folder."""
    assert sorted(os.listdir(got / "adapter")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    got, want = interop.load(got / "adapter"), interop.load(want / "adapter")
    assert got.modules == want.modules
    assert len(got.modules) > 10
    for name, pair in want.factors.items():
        np.testing.assert_allclose(got.factors[name].lam, pair.lam, err_msg=name, **tolerance)
        np.testing.assert_allclose(got.factors[name].gamma, pair.gamma, err_msg=name, **tolerance)
        assert pair.lam.any()
    np.testing.assert_array_equal(got.bases.B, want.bases.B)


def losses(out):
    return np.atleast_1d(np.loadtxt(out / "losses.txt"))


@pytest.fixture(scope="module")
def flax(tmp_path_factory):
    """What three runs printed, and where they wrote: two processes; one, on another mesh; two of Slurm that go on."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("two", "one", "slurm")}
    port = next(port for port in range(12321, 22321, 10) if is_free(port))
    both = console("COORDINATOR_ADDRESS").replace("12321", str(port)) + "\nwait $!"
    printed = {"two": shell(both, folders["two"])}
    out = {"two": folders["two"] / "runs" / FLAX}
    out["one"] = start(folders["one"], FLAX, out["two"], "base")
    printed["one"] = shell(f"python examples/{FLAX}.py --smoke", folders["one"], JAX_NUM_CPU_DEVICES="4")
    out["slurm"] = start(folders["slurm"], FLAX, out["two"], "base", "checkpoints/1")
    options = {"JAX_NUM_CPU_DEVICES": "2", "MESH": "fsdp=2,tp=2"}
    jax_port = lambda job: job % 2**12 + 2**16 - 2**12  # noqa: E731
    printed["slurm"] = slurm("slurm_flax.sh", folders["slurm"], port_of_job=jax_port, **options)
    return printed, out


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory):
    """Likewise: one process, two of FSDP2 that go on from its checkpoint, and two of DDP on two nodes of Slurm."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "fsdp", "slurm")}
    printed = {"one": shell(f"python examples/{TORCH}.py --smoke", folders["one"])}
    out = {"one": folders["one"] / "runs" / TORCH}
    out["fsdp"] = start(folders["fsdp"], TORCH, out["one"], "base", "checkpoint-4")
    printed["fsdp"] = shell(console("fsdp2.yaml", "--smoke"), folders["fsdp"])
    out["slurm"] = start(folders["slurm"], TORCH, out["one"], "base")
    torch_port = lambda job: 20000 + job % 20000  # noqa: E731
    options = {"port_of_job": torch_port, "CONFIG": "examples/configs/ddp.yaml"}
    printed["slurm"] = slurm("slurm_torch.sh", folders["slurm"], **options)
    return printed, out


def test_two_processes_in_jax_are_what_the_page_says_and_train_as_one_does(flax):
    printed, out = flax
    first_line = "2 process(es), 4 device(s), mesh {'fsdp': 2, 'tp': 2}"
    assert first_line in printed["two"]
    assert f"`{first_line}`" in PAGE.read_text()
    assert "1 process(es), 4 device(s), mesh {'fsdp': 4, 'tp': 1}" in printed["one"]
    assert len(losses(out["one"])) == STEPS
    np.testing.assert_allclose(losses(out["two"]), losses(out["one"]), **NOISE)
    assert_same_adapter(out["two"], out["one"], **DRIFT)


def test_a_slurm_job_in_jax_is_detected_and_goes_on_bit_for_bit(flax):
    printed, out = flax
    assert "2 process(es), 4 device(s), mesh {'fsdp': 2, 'tp': 2}" in printed["slurm"]
    np.testing.assert_array_equal(losses(out["slurm"]), losses(out["two"])[1:])
    assert_same_adapter(out["slurm"], out["two"], rtol=0)


def test_two_nodes_of_slurm_in_torch_train_as_one_process_does(in_torch):
    printed, out = in_torch
    assert "2 process(es), MULTI_CPU" in printed["slurm"]
    assert len(losses(out["one"])) == STEPS
    np.testing.assert_allclose(losses(out["slurm"]), losses(out["one"]), **NOISE)
    assert_same_adapter(out["slurm"], out["one"], **DRIFT)


def test_fsdp2_in_two_processes_goes_on_from_the_checkpoint_of_one(in_torch):
    printed, out = in_torch
    assert "2 process(es), FSDP" in printed["fsdp"]
    assert f"going on from runs/{TORCH}/checkpoint-4" in printed["fsdp"]
    np.testing.assert_allclose(losses(out["fsdp"]), losses(out["one"])[4:], **NOISE)
    assert_same_adapter(out["fsdp"], out["one"], **DRIFT)


def test_fsdp2_writes_the_checkpoint_that_one_process_writes(in_torch):
    _, out = in_torch
    got, want = (torch.load(out[name] / "checkpoint-8" / "optimizer.pt") for name in ("fsdp", "one"))
    assert len(want["state"]) == 2 * 14  # lambda and gamma of every layer, and nothing of the base
    assert json.dumps(got["param_groups"]) == json.dumps(want["param_groups"])  # lists for tuples
    torch.testing.assert_close(got["state"], want["state"], rtol=1e-3, atol=1e-8)
    assert sorted(os.listdir(out["fsdp"] / "checkpoint-8")) == sorted(os.listdir(out["one"] / "checkpoint-8"))


def test_both_end_with_the_line_that_their_docstrings_tell(flax, in_torch):
    for example, printed in ((FLAX, flax[0]), (TORCH, in_torch[0])):
        last = f"the reloaded adapter gives the same loss; it is in runs/{example}/adapter"
        assert last in documentation(example)
        for run, text in printed.items():
            assert text.splitlines().count(last) == 1, f"{example}, {run}\n{text[-3000:]}"


def documentation(example):
    return ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text()))


@pytest.mark.parametrize("example", [FLAX, TORCH])
def test_an_example_is_short_and_has_few_options(example):
    lines = (ROOT / "examples" / f"{example}.py").read_text().splitlines()
    assert len(lines) <= 200
    assert sum("add_argument(" in line for line in lines) <= 8


def load_example(name):
    spec = importlib.util.spec_from_file_location(name.lstrip("0123456789_"), ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"NUM_PROCESSES": "2"}, r"COORDINATOR_ADDRESS=, NUM_PROCESSES=2, PROCESS_ID=: give host:port of process 0"),
        (
            {"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "PROCESS_ID=2: give .* 0 to that - 1",
        ),
        ({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "NUM_PROCESSES=two, .*: give"),
        (
            {"COORDINATOR_ADDRESS": "host", "NUM_PROCESSES": "2", "PROCESS_ID": "0"},
            "COORDINATOR_ADDRESS=host, .*: give",
        ),
    ],
)
def test_jax_is_told_what_is_wrong_with_the_processes(given, message, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.setenv(name, given.get(name, ""))
    with pytest.raises(SystemExit, match=message):
        load_example(FLAX).connect()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("fsdp=4,tp=4", "takes 16 devices, but the processes have 8 in all"),
        ("fsdp=0", "takes 0 devices"),
        ("data=8", "give the sizes of fsdp and tp"),
        ("fsdp=4,fsdp=2", "give the sizes of fsdp and tp"),
        ("fsdp", "give the sizes of fsdp and tp"),
    ],
)
def test_jax_is_told_what_is_wrong_with_the_mesh(mesh, message, monkeypatch):
    monkeypatch.setenv("MESH", mesh)
    with pytest.raises(SystemExit, match=message):
        load_example(FLAX).mesh_from_environment()


def test_the_mesh_must_divide_the_batch(monkeypatch):
    example = load_example(FLAX)
    monkeypatch.setenv("MESH", "fsdp=8")
    assert example.mesh_from_environment().shape == {"fsdp": 8, "tp": 1}
    monkeypatch.setattr(example, "BATCH_SIZE", 12)
    with pytest.raises(SystemExit, match="fsdp must divide the batch of 12"):
        example.mesh_from_environment()


def test_torch_is_told_what_is_wrong_with_the_processes(monkeypatch):
    example = load_example(TORCH)
    monkeypatch.setattr(example, "Accelerator", lambda **_: SimpleNamespace(num_processes=3))
    with pytest.raises(SystemExit, match="3 processes: their number must divide the batch of 16"):
        example.connect()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(SystemExit, match="8 tasks of Slurm, each on its own: start one `accelerate launch` per node"):
        example.connect()


def launch_arguments(name):
    """What `accelerate launch` makes of a config file, with every key of it understood."""
    given = ["--config_file", str(CONFIGS / name), "--main_process_port", "0", str(ROOT / "examples" / f"{TORCH}.py")]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 2, "no")
    sections = [section for section in vars(config).values() if isinstance(section, dict)]
    for key, value in (item for section in sections for item in section.items()):
        assert getattr(arguments, key) == value, key
    return arguments, config


def test_accelerate_reads_fsdp2_as_it_is_meant():
    arguments, config = launch_arguments("fsdp2.yaml")
    assert config.distributed_type is DistributedType.FSDP
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config.keys() <= known
    with patch_environment(**prepare_multi_gpu_env(arguments)):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, True)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.mixed_precision_policy is None  # lambda and gamma stay in float32


def test_accelerate_reads_ddp_as_it_is_meant():
    arguments, config = launch_arguments("ddp.yaml")
    assert config.distributed_type is DistributedType.MULTI_GPU
    assert arguments.multi_gpu
    assert not arguments.use_fsdp


@pytest.mark.parametrize(("stage", "name"), [(2, "deepspeed_zero2.json"), (3, "deepspeed_zero3.json")])
def test_the_configs_of_deepspeed_are_of_their_stages_and_leave_the_batch_to_accelerate(stage, name):
    config = HfDeepSpeedConfig(CONFIGS / name)
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config.get_value(key) == "auto"


def test_zero3_splits_kernels_and_leaves_factors_whole():
    """For Llama's shapes from 7 to 70 billion parameters, at the usual r."""
    threshold = HfDeepSpeedConfig(CONFIGS / "deepspeed_zero3.json").get_value(
        "zero_optimization.stage3_param_persistence_threshold"
    )
    for shape in ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192), (1024, 4096)):
        factors = factor_shapes(shape, r=32)
        assert max(np.prod(size) for size in factors) <= threshold < np.prod(shape)


def test_accelerate_reads_deepspeed_as_it_is_meant():
    config = load_config_from_file(str(CONFIGS / "deepspeed.yaml"))
    assert config.distributed_type is DistributedType.DEEPSPEED
    assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.deepspeed_config.keys() <= known


def test_the_pods_of_kubernetes_find_each_other_and_know_their_numbers():
    service, job = yaml.safe_load_all((CONFIGS / "kubernetes_flax.yaml").read_text())
    spec, name = job["spec"], service["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert variables["NUM_PROCESSES"]["value"] == str(spec["completions"]) == str(spec["parallelism"])
    assert (service["spec"]["clusterIP"], pod["subdomain"]) == ("None", name)
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert variables["COORDINATOR_ADDRESS"]["value"].partition(":")[0] == f"{job['metadata']['name']}-0.{name}"
    assert variables["PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"].endswith("job-completion-index']")
    documents.check_command(" ".join(container["command"]))


def test_the_page_shows_every_config_file():
    text = PAGE.read_text()
    for file in CONFIGS.iterdir():
        assert f"literalinclude}} ../examples/configs/{file.name}" in text, file.name
