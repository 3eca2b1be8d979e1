#!/bin/bash
#SBATCH --job-name=randlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00

# One process per GPU: on Slurm, jax gives each process the GPU of its number on the node, of all that it sees; so not
# --gpus-per-task. Options of the script are options of this one: MESH=fsdp=8,tp=2 sbatch slurm_flax.sh --out /shared/run
srun python examples/13_multi_host_flax.py "$@"
