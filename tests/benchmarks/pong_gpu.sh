#!/usr/bin/env bash
# The GPU figures of Pong: minutes to a mean greedy score of 18, steps/s against Stable-Baselines3, the parts of a pass.
#
#     pip install -r requirements.txt -r tests/benchmarks/requirements.txt      # with a torch built for your CUDA
#     tests/benchmarks/pong_gpu.sh                # on a machine with a GPU and 16 cores, about 20 minutes
#     tests/benchmarks/pong_gpu.sh train          # one or two of the stages train, sb3, parts
#     SMOKE=1 tests/benchmarks/pong_gpu.sh        # 20,000 steps on a CPU, small buffer, games cut short
#     SMOKE=1 STEPS=1600 tests/benchmarks/pong_gpu.sh     # proof without a GPU that the commands work
#
# Variables: ENVS, STEPS of the whole training (schedules follow), BUDGET of it in seconds, GOAL, the mean greedy score
# that ends it earlier, and FOLDER, where runs/ is made. Training that runs out of time is stopped as Ctrl-C would, and
# its best network plays 100 games.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
dqn=$here/../../dqn.py
cd "${FOLDER:-$(mktemp -d)}"

if [ -z "${SMOKE:-}" ]; then
    envs=${ENVS:-64} steps=${STEPS:-10000000} short=30000 passes=300000 starts=1000
    numbers="16 32 64 128" small=() own=()
else
    envs=${ENVS:-8} steps=${STEPS:-20000} short=${STEPS:-20000} passes=${STEPS:-20000} starts=$((${STEPS:-20000} / 4))
    numbers=$envs small=(--no-cuda --buffer-size 20000 --learning-starts "$starts")
    own=(--compile --eval-frequency $((steps / 2)) --eval-episodes 8 --eval-max-steps 50)
fi

train() {
    echo "== to a mean greedy score of ${GOAL:-18}, or the end of ${BUDGET:-600} seconds"
    timeout --signal=INT "${BUDGET:-600}" python "$dqn" --env-id ALE/Pong-v5 --num-envs "$envs" \
        --total-timesteps "$steps" --stop-return "${GOAL:-18}" --no-checkpoint-replay "${small[@]}" "${own[@]}" ||
        { [ $? = 124 ] && python "$dqn" --evaluate "$(ls -td runs/* | head -n 1)" --eval-episodes 100; }
}

sb3() {
    local same=(--env-id ALE/Pong-v5 --learning-rate 1e-4 --buffer-size 20000 --batch-size 32 --train-frequency 4
        --target-network-frequency 1000 --learning-starts "$starts" --total-timesteps "$short" "${small[@]}")
    echo "== one gradient step of 32 transitions in 4 steps, 8 environments: steps/s of Stable-Baselines3"
    python "$here/sb3_dqn.py" --num-envs 8 --processes "${same[@]}"
    echo "== and of dqn.py"
    python "$dqn" --no-tuned --num-envs 8 --frame-stack 4 --clip-rewards --hidden-sizes 512 --no-double-q \
        --no-layer-norm --no-anneal-lr --eval-frequency 0 --eval-max-steps 1 "${same[@]}"
    same=(--env-id ALE/Pong-v5 --learning-rate 1e-4 --buffer-size 100000 --batch-size 128 --train-frequency 16
        --target-network-frequency 8000 --n-step 3 --max-grad-norm 10 --learning-starts "$starts"
        --total-timesteps "$short" "${small[@]}")
    echo "== with the batch and frequencies of TUNED, $envs environments: steps/s of Stable-Baselines3"
    python "$here/sb3_dqn.py" --num-envs "$envs" --processes "${same[@]}"
}

parts() {
    for number in $numbers; do
        echo "== a pass of $number environments"
        python "$here/parts.py" --env-id ALE/Pong-v5 --num-envs "$number" --total-timesteps "$passes" "${small[@]}" \
            "${own[@]}" --eval-frequency 0 --eval-max-steps 1
    done
}

for stage in ${*:-train sb3 parts}; do "$stage"; done
