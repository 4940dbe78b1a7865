"""Training: the state, a pure step, a mesh, checkpoints, telemetry and the host's loop."""
