"""Launch files: they parse, their counts are the plan's, and the Slurm script does what it says when it is run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mmllm import cli
from mmllm.plan.hardware import GPUS
from mmllm.plan.launch import Launch, Site, write

WORDS = ("pretrain_8b_fp8", "--wandb", "it's a project")


def launch(gpus: int = 128, **changes: object) -> Launch:
    return Launch(**{"name": "pretrain_8b_fp8", "verb": "pretrain", "words": WORDS, "gpus": gpus, "gpu": GPUS["h100"], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [1, 8, 128])
def test_scripts_are_bash(tmp_path: Path, gpus: int) -> None:
    scripts = [path for path in write(tmp_path, launch(gpus), Site(partition="gpu", account="lab")) if path.suffix == ".sh"]
    assert len(scripts) == 2
    for path in scripts:
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize(("gpus", "hardware", "nodes", "each"), [
    (1, "h100", 1, 1), (8, "h100", 1, 8), (128, "h100", 16, 8), (72, "gb200", 18, 4)])
def test_nodes_and_gpus_are_those_of_the_plan(tmp_path: Path, gpus: int, hardware: str, nodes: int, each: int) -> None:
    yaml = pytest.importorskip("yaml")
    write(tmp_path, launch(gpus, gpu=GPUS[hardware]), Site(hours=12.5))
    slurm, torchrun = (tmp_path / "slurm.sh").read_text(), (tmp_path / "torchrun.sh").read_text()
    for line in (f"--nodes={nodes}", f"--ntasks-per-node={each}", f"--gpus-per-node={each}", "--time=12:30:00", "--signal=USR1@600",
                 "--requeue"):
        assert f"#SBATCH {line}\n" in slurm
    assert f"--nnodes {nodes} --nproc-per-node {each} " in torchrun and ("--standalone" in torchrun) == (nodes == 1)
    job = yaml.safe_load((tmp_path / "kubernetes.yaml").read_text())
    assert (job["kind"], job["apiVersion"], job["metadata"]["name"]) == ("PyTorchJob", "kubeflow.org/v1", "pretrain-8b-fp8")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": each}
        assert f"--nnodes {nodes} --nproc-per-node {each} " in container["args"][0]
        subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


def test_gpus_that_are_no_whole_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="12 GPUs are no whole nodes of 8"):
        _ = launch(12).nodes


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("code", "queued"), [(0, ""), (143, "requeue 1234\n"), (1, "")])
def test_the_slurm_script_starts_ranks_and_queues_itself_again_when_they_were_told_to_stop(tmp_path: Path, code: int, queued: str) -> None:
    write(tmp_path, launch(16), Site())
    # a Slurm of two tasks
    program(tmp_path, "srun", 'while [ "$1" != bash ]; do shift; done\n'
                              'SLURM_PROCID=8 SLURM_LOCALID=0 "$@" || exit\nSLURM_PROCID=9 SLURM_LOCALID=1 "$@"')
    program(tmp_path, "scontrol", f'if [ "$1" = show ]; then echo node7; else echo "$@" >> {tmp_path}/queue; fi')
    program(tmp_path, "python", f'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT |$4|$5|$6|" >> {tmp_path}/ranks\n'
                                f'[ "$RANK" = 9 ] && exit {code}; exit 0')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "16",
                   "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(["bash", tmp_path / "slurm.sh"], env=environment, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "ranks").read_text().splitlines() == [
        f"{rank} of 16, {rank - 8}, node7:29734 |pretrain_8b_fp8|--wandb|it's a project|" for rank in (8, 9)]
    assert ((tmp_path / "queue").read_text() if (tmp_path / "queue").exists() else "") == queued


def test_a_changed_field_of_the_recipe_is_in_the_files_too(tmp_path: Path) -> None:
    cli.run(["plan", "pretrain_8b_fp8", "--gpus", "64", "--write", str(tmp_path), "--optim.lr", "1e-4", "--site.partition", "h100"])
    text = (tmp_path / "slurm.sh").read_text()
    assert "mmllm.cli pretrain pretrain_8b_fp8 --optim.lr 1e-4" in text and "--nodes=8\n" in text and "--partition=h100\n" in text
