"""Launch files of a recipe: torchrun, Slurm, Kubernetes. Rendered from the plan's numbers, so that nodes and ranks agree with the layout.

How a run is told to stop decides their shape. A rank that hears SIGTERM or SIGUSR1 saves and ends with 143, and the same command
continues it. Slurm can tell the ranks themselves, ahead of the time limit, so its script starts them without torchrun, whose agent dies
of SIGUSR1 and kills ranks 30 s after SIGTERM (torch/distributed/elastic/multiprocessing/api.py, `close`).
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mmllm.plan.hardware import Gpu

PORT = 29500
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",                          # collectives of tp are launched ahead of the products that hide them
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",       # less lost between blocks
    "OMP_NUM_THREADS": "8",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a cluster wants to know besides."""

    partition: str = ""
    """Slurm: partition; empty for the default."""
    account: str = ""
    """Slurm: account; empty for the default."""
    hours: float = 24.0
    """Slurm: time limit of one job; a run that needs longer is queued again."""
    save_minutes: float = 10.0
    """Slurm: time to save before the limit."""
    image: str = "mmllm:latest"
    """Kubernetes: container image with mmllm, Transformer Engine and flash-attn installed."""
    claim: str = "mmllm"
    """Kubernetes: volume claim that holds models, shards and runs, mounted at /data."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is started."""

    name: str
    verb: str
    """pretrain or sft."""
    words: tuple[str, ...]
    """The recipe and what is changed of it."""
    gpus: int
    gpu: Gpu

    @property
    def each(self) -> int:
        """GPUs of a node."""
        return min(self.gpus, self.gpu.node)

    @property
    def nodes(self) -> int:
        if self.gpus % self.each:
            raise ValueError(f"{self.gpus} GPUs are no whole nodes of {self.each}: give --gpus a multiple")
        return self.gpus // self.each

    @property
    def command(self) -> str:
        """Of one rank, behind `python` or `torchrun`."""
        return shlex.join(("-m", "mmllm.cli", self.verb, *self.words))

    @property
    def label(self) -> str:
        """The name in letters that Kubernetes allows."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")


def write(folder: Path, launch: Launch, site: Site) -> list[Path]:
    """torchrun.sh, slurm.sh and kubernetes.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"torchrun.sh": torchrun(launch), "slurm.sh": slurm(launch, site), "kubernetes.yaml": kubernetes(launch, site)}
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755 if name.endswith(".sh") else 0o644)
    return [folder / name for name in files]


def _exports() -> str:
    return "\n".join(f"export {name}={value}" for name, value in ENVIRONMENT.items())


def torchrun(launch: Launch) -> str:
    """The same script on every node."""
    if launch.nodes == 1:
        meet, usage = "--standalone", "bash torchrun.sh"
    else:
        meet = f'--rdzv-backend c10d --rdzv-id {launch.label} --rdzv-endpoint "$HEAD"'
        usage = f"HEAD=<first node>:{PORT} bash torchrun.sh, on each of {launch.nodes} nodes"
    head = "" if launch.nodes == 1 else f': "${{HEAD:?give HEAD=<first node>:{PORT}}}"\n'
    return f"""#!/bin/bash
# {launch.name}: {launch.gpus} GPUs on {launch.nodes} nodes of {launch.each}. {usage}
# A rank that fails ends the others, and all begin again at the newest whole checkpoint, up to three times.
# SIGTERM to torchrun stops the run; its ranks have 30 s to save.
set -euo pipefail
{head}{_exports()}
exec torchrun --nnodes {launch.nodes} --nproc-per-node {launch.each} --max-restarts 3 {meet} \\
    {launch.command}
"""


def slurm(launch: Launch, site: Site) -> str:
    """A job that queues itself again until the run has ended."""
    hours, minutes = divmod(math.ceil(site.hours * 60), 60)
    optional = "".join(f"#SBATCH --{name}={value}\n" for name, value in (("partition", site.partition), ("account", site.account)) if value)
    return f"""#!/bin/bash
#SBATCH --job-name={launch.name}
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node={launch.each}
#SBATCH --gpus-per-node={launch.each}
#SBATCH --cpus-per-task={ENVIRONMENT["OMP_NUM_THREADS"]}
#SBATCH --exclusive
#SBATCH --time={hours:02d}:{minutes:02d}:00
#SBATCH --signal=USR1@{math.ceil(site.save_minutes * 60)}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={launch.name}-%j.log
{optional}# {launch.name}: {launch.gpus} GPUs, a task for each. `sbatch slurm.sh`, once.
# SIGUSR1 reaches the ranks {site.save_minutes:g} minutes before the time limit: they save and end with 143, and the job is queued again.
# A node that fails has the job queued again by Slurm (--requeue); the run begins at the newest whole checkpoint.
set -uo pipefail
{_exports()}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$(({PORT} + SLURM_JOB_ID % 1000)) WORLD_SIZE=$SLURM_NTASKS

# exec: signals are the rank's own. The first rank to end does not end the others, which may still be saving; minutes later it does
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait={math.ceil(site.save_minutes * 60)} \\
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank python {launch.command}
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def kubernetes(launch: Launch, site: Site) -> str:
    """A PyTorchJob of Kubeflow's training operator v1 (kubeflow.org/v1): a pod a node, torchrun in each."""
    environment = "".join(f"\n                - {{name: {name}, value: \"{value}\"}}" for name, value in ENVIRONMENT.items())
    # RANK and MASTER_* are the pod's, set by the operator
    start = (f"exec torchrun --nnodes {launch.nodes} --nproc-per-node {launch.each} --node-rank \"$RANK\" --master-addr \"$MASTER_ADDR\" "
             f"--master-port \"$MASTER_PORT\" {launch.command}")
    pod = f"""
      restartPolicy: OnFailure
      template:
        spec:
          terminationGracePeriodSeconds: 60
          containers:
            - name: pytorch  # the operator looks for this name
              image: {site.image}
              command: [bash, -c]
              args:
                - >-
                  {start}
              env:{environment}
              resources:
                limits:
                  nvidia.com/gpu: {launch.each}
              volumeMounts:
                - {{name: data, mountPath: /data}}
                - {{name: shm, mountPath: /dev/shm}}
          volumes:
            - name: data
              persistentVolumeClaim: {{claimName: {site.claim}}}
            - name: shm  # loader processes and NCCL
              emptyDir: {{medium: Memory}}
"""
    workers = f"    Worker:\n      replicas: {launch.nodes - 1}{pod}" if launch.nodes > 1 else ""
    return f"""# {launch.name}: {launch.gpus} GPUs on {launch.nodes} nodes of {launch.each}. `kubectl apply -f kubernetes.yaml`
# A pod that fails is started again and the run continues from the newest whole checkpoint.
# Ranks of a pod that is told to go have 30 s to save.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {launch.label}
spec:
  runPolicy:
    cleanPodPolicy: Running
    backoffLimit: 100
  pytorchReplicaSpecs:
    Master:
      replicas: 1{pod}{workers}"""
