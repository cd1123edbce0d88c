"""MinAtar's environments for Gymnasium: with this folder in PYTHONPATH, --env-id minatar_envs:MinAtar/Breakout-v1."""

import minatar.gym

minatar.gym.register_envs()
