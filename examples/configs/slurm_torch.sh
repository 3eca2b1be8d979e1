#!/bin/bash
#SBATCH --job-name=randlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00

# One launcher per node, which starts one process per GPU. Options of the script are options of this one:
# CONFIG=examples/configs/ddp.yaml sbatch slurm_torch.sh --out /shared/run
export CONFIG=${CONFIG:-examples/configs/fsdp2.yaml}
export PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
export MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a node must not share a port

srun bash -c 'accelerate launch --config_file "$CONFIG" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES" \
  --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT" \
  examples/14_multi_node_torch.py "$@"' launch "$@"
