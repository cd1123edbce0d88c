#!/usr/bin/env bash
# The GPU figures of Pong: minutes to a mean greedy score of 18, steps/s against Stable-Baselines3, the parts of a pass.
#
#     pip install -r requirements.txt -r tests/benchmarks/requirements.txt      # with a torch built for your CUDA
#     tests/benchmarks/pong_gpu.sh                # on a machine with a GPU and 16 cores, about a quarter of an hour
#     STEPS=20000 ENVS=8 tests/benchmarks/pong_gpu.sh --no-cuda --buffer-size 20000 --learning-starts 5000 \
#         --eval-max-steps 200                    # proof without a GPU that the commands work
#
# What comes after the name is passed to dqn.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/benchmarks
cd "$(mktemp -d)"
pong="--env-id ALE/Pong-v5 --num-envs ${ENVS:-64}"

echo "== to a mean greedy score of 18, or the end"
python "$root/dqn.py" $pong --total-timesteps "${STEPS:-10000000}" --stop-return 18 "$@"

echo "== steps/s of Stable-Baselines3, one gradient step of 32 transitions in 4 steps; of dqn.py the same"
same="--learning-rate 1e-4 --buffer-size 20000 --learning-starts 1000 --batch-size 32 --train-frequency 4
      --target-network-frequency 1000 --total-timesteps ${SHORT:-20000}"
python "$here/sb3_dqn.py" --env-id ALE/Pong-v5 --num-envs 8 --processes $same
python "$root/dqn.py" --env-id ALE/Pong-v5 --num-envs 8 --no-tuned --frame-stack 4 --clip-rewards --hidden-sizes 512 \
    --eval-frequency 0 --eval-max-steps 1 $same

echo "== the parts of a pass"
python "$here/parts.py" $pong --total-timesteps "${STEPS:-500000}" --eval-frequency 0 "$@" --eval-max-steps 1
