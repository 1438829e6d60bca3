import pipeline  # noqa: F401  sets OpenMP's waiting policy, which is read when torch is loaded
